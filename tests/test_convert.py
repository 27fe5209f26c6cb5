"""data/convert.py: people's files, in whatever form, encoding and state of repair, from disk or
over HTTP, become plain records; what cannot be used is counted and named."""

import bz2
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import subprocess
import sys
import threading
import tracemalloc
import types
import zipfile

import numpy as np
import pytest

from data import convert
from data.convert import cut_documents, find_files, main, read_values, receive

USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(tmp_path, task, *arguments):
    """The records that the command makes of its arguments, which may be paths."""
    to = tmp_path / "made" / "new.jsonl"
    if to.exists():
        to.unlink()
    main([*map(str, arguments), f"--as={task}", f"--to={to}"])
    assert [path.name for path in to.parent.iterdir() if "tmp" in path.name] == []
    return [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()]


def one_line(function, *arguments):
    """The line in which a call ends."""
    with pytest.raises(SystemExit) as error:
        function(*arguments)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def refused(tmp_path, task, *arguments):
    """The line in which the command ends; it has written nothing."""
    line = one_line(run, tmp_path, task, *arguments)
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())
    return line


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts(tmp_path, *arguments):
    return [record["text"] for record in run(tmp_path, "text", *arguments)]


# --------------------------------------------------------------------------------------------------
# Text

JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 4
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая по-своему. " * 3


@pytest.mark.parametrize("data, text, note", [
    ("Größe\nzwei".encode(), "Größe\nzwei", ""),
    (b"\xef\xbb\xbfeins", "eins", ""),
    ("Größe".encode("utf-16"), "Größe", ""),
    ("Größe".encode("latin-1"), "Größe", "cp1252"),
    ("é".encode("latin-1"), "é", "UTF-8"),
    ("“it’s” – €".encode("cp1252"), "“it’s” – €", "cp1252"),
    (b'<meta charset="utf-8">\n\xe4\xf6', '<meta charset="utf-8">\näö', "cp1252"),
    (b'<meta charset="klingon">\n\xe4\xf6', '<meta charset="klingon">\näö', "cp1252"),
    (b"charset=hex \xe4\xf6", "charset=hex äö", "cp1252"),
    (b"<meta charset='cp1251'>" + "мир".encode("cp1251"), "<meta charset='cp1251'>мир", "cp1251"),
    (b"encoding: KOI8-R\n" + "мир".encode("koi8-r"), "encoding: KOI8-R\nмир", "KOI8-R"),
    (b"charset=gbk " + "世界".encode("gbk"), "charset=gbk 世界", "gbk"),
    (b"charset=Shift_JIS " + "猫だ".encode("shift_jis"), "charset=Shift_JIS 猫だ", "Shift_JIS"),
    (b"charset=EUC-JP " + "猫だ".encode("euc_jp"), "charset=EUC-JP 猫だ", "EUC-JP"),
    (b"charset=iso-2022-jp " + "猫だ".encode("iso2022_jp"), "charset=iso-2022-jp 猫だ", "2022"),
    (JAPANESE.encode("shift_jis"), JAPANESE, "cp932"),
    (JAPANESE.encode("euc_jp"), JAPANESE, "euc_jp"),
    (RUSSIAN.encode("cp1251"), RUSSIAN, "cp1251"),
    (RUSSIAN.encode("koi8-r"), RUSSIAN, "koi8_r"),
    ("“It’s – fine” ".encode() * 3 + b"caf\xe9, \xe2\x80.", "“It’s – fine” " * 3 + "café, �.",
     "UTF-8"),
    (b"a\r\nb\x00c\r\nd", "a\nb\x00c\nd", "")])
def test_encodings(tmp_path, capsys, data, text, note):
    """UTF-8 with and without its mark and with damage, UTF-16, what a file declares, a guess where
    that is safe, or else Latin-1: with a note wherever it is not UTF-8."""
    (tmp_path / "a.txt").write_bytes(data)
    assert texts(tmp_path, tmp_path / "a.txt", "--separator=<>") == [text]
    said = capsys.readouterr().out
    assert note in said and (note or "UTF-8" not in said)


def test_damage_far_behind_the_beginning(tmp_path):
    """A first accent after many pages, and a character that is cut by a block, are read rightly."""
    (tmp_path / "a.txt").write_bytes(b"x" * 70_000 + b"caf\xe9 ")
    (tmp_path / "b.txt").write_bytes(b"x" * (2**16 - 1) + "é".encode())
    assert texts(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt") == [
        "x" * 70_000 + "café ", "x" * (2**16 - 1) + "é"]


@pytest.mark.parametrize("module", [gzip, lzma, bz2])
def test_packed_files(tmp_path, module):
    """That a file is packed is seen by its content; one that was cut off is named."""
    whole = np.random.default_rng(0).integers(97, 122, 30_000, dtype=np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(module.compress(whole))
    assert texts(tmp_path, tmp_path / "a.txt") == [whole.decode()]
    (tmp_path / "a.txt").write_bytes(module.compress(whole)[:9000])
    assert "a.txt" in refused(tmp_path, "text", tmp_path / "a.txt")


def pack(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.txt.zip", "a.txt"])
def test_a_file_in_a_zip_archive(tmp_path, name):
    """The one file of an archive is read like any other, whatever the archive is called; what a Mac
    adds to it does not count."""
    path = pack(tmp_path / name, {"books/": "", "books/Emma.txt": "Größe".encode("latin-1"),
                                  "__MACOSX/books/._Emma.txt": "\0"})
    assert texts(tmp_path, path) == ["Größe"]


@pytest.mark.parametrize("inside, content", [
    ("a.csv", "prompt,response\nWhy?,Because.\n"),
    ("a.jsonl", '{"prompt": "Why?", "response": "Because."}\n')])
def test_records_in_a_zip_archive(tmp_path, inside, content):
    """What it holds is known by the name inside it."""
    path = pack(tmp_path / "a.zip", {inside: content})
    assert run(tmp_path, "demonstrations", path) == [{"messages": [USER, ASSISTANT]}]


@pytest.mark.parametrize("files", [{}, {"a.txt": "one", "b.txt": "two"}])
def test_several_files_in_a_zip_archive(tmp_path, files):
    """Which of several files is meant nobody knows: the line says how many there are."""
    path = pack(tmp_path / "a.zip", files)
    line = refused(tmp_path, "text", path)
    assert f"a zip archive of {len(files)} files; unpack it" in line
    assert "unpack it" in refused(tmp_path, "demonstrations", path)


def test_damaged_zip_archive(tmp_path):
    """One that is cut off, whose content has changed, or that asks for a password is named."""
    whole = pack(tmp_path / "a.zip", {"a.txt": "the fox " * 9}).read_bytes()
    locked = bytearray(whole)
    locked[6] |= 1  # in the file's own header and in the directory: it is encrypted
    locked[whole.index(b"PK\1\2") + 8] |= 1
    changed = bytearray(whole)
    changed[whole.index(b"a.txt") + 8] ^= 1
    for damaged, words in ((whole[:40], "zip"), (locked, "password"), (changed, "")):
        (tmp_path / "a.zip").write_bytes(damaged)
        line = refused(tmp_path, "text", tmp_path / "a.zip")
        assert "a.zip cannot be read" in line and words in line


@pytest.mark.parametrize("data, name", [
    (b"%PDF-1.7\n1 0 obj", "a PDF"), (b"\x28\xb5\x2f\xfd abc", "packed by zstd"),
    (b"Rar!\x1a\x07", "a rar archive"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"a.txt".ljust(257, b"\0") + b"ustar\0", "a tar archive"), (bytes(100), "a binary file"),
    ("two bytes each".encode("utf-16-le") * 9, "a binary file")])
def test_binary_is_never_text(tmp_path, data, name):
    """What cannot be unpacked here is named, and refused, though it be called a text."""
    for kind in ("a.txt", "a.jsonl"):
        (tmp_path / kind).write_bytes(data)
        assert f"{kind} is {name}, not text" in refused(tmp_path, "text", tmp_path / kind)


@pytest.mark.parametrize("separator, expected", [
    ("<|endoftext|>", ["one\n\ntwo ", "three"]), ("", ["one", "two <|endoftext|>\nthree"]),
    ("\\n", ["one", "two <|endoftext|>", "three"])])
def test_documents_of_a_text_file(tmp_path, capsys, separator, expected):
    """A file is cut at its separator, also within a line, at blank lines, or at each line."""
    (tmp_path / "a.txt").write_text("one\n\ntwo <|endoftext|>\nthree\n\n\n")
    assert texts(tmp_path, tmp_path / "a.txt", f"--separator={separator}") == expected
    assert "one document" not in capsys.readouterr().out
    texts(tmp_path, tmp_path / "a.txt", "--separator=---")
    assert "one document" in capsys.readouterr().out


@pytest.mark.parametrize("lines", [["0123456789\n"] * 1000, ["0123456789"] * 1000 + ["\n", "end"]])
def test_book_of_any_length(lines):
    """Text without a separator is cut all the same, and no character is lost."""
    parts = list(cut_documents(lines, "<|endoftext|>", longest=500))
    assert "".join(parts) == "".join(lines)
    assert max(map(len, parts)) < 520 and len(parts) > 15
    parts = list(cut_documents(["a" * 25 + "--", "-b"], "---", longest=20))
    assert parts == ["a" * 24, "a", "b"]  # the separator is not cut


@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 14, 40])
def test_separators_in_pieces(size):
    """A separator that two pieces share is one all the same; half of one is text."""
    for text, separator in (
            ("one<|endoftext|>two <|end <|endof<|endoftext|><three<|endoftext|>four <|endoftex",
             "<|endoftext|>"), ("one ---two-- --- - ----- six\n---", "---")):
        pieces = [text[i:i + size] for i in range(0, len(text), size)]
        assert list(cut_documents(pieces, separator)) == text.split(separator)


def test_html_becomes_text(tmp_path, capsys):
    """Words stay, markup, scripts and styles go; blocks are lines, entities characters."""
    page = tmp_path / "a.html"
    page.write_text(
        "<!doctype html><html><head><title>No</title><style>p {}</style></head><body><h1>The  Fox"
        "</h1><p>He <b>ran</b> &amp; hid.</p><script>if (a < b) alert('<p>')</script><p>It\nrained."
        "<br>All day.</body>")
    assert texts(tmp_path, page) == ["The Fox\n\nHe ran & hid.\n\nIt rained.\nAll day."]
    assert "page of HTML" in capsys.readouterr().out
    page.write_bytes(b"<head><meta charset=undefined><title>No</title><body>No head \xe9nds.")
    assert texts(tmp_path, page) == ["No head énds."]


def test_html_under_any_name(tmp_path):
    """A page is known by how it begins; a text that only mentions markup is a text."""
    beginnings = ("\n\n<!doctype html>", "<!-- a --><!-- <b> -->\n<!DOCTYPE  html>",
                  '<?xml version="1"?><HTML>')
    for begun in beginnings:
        (tmp_path / "page").write_text(begun + "<p>The <b>fox</b>.")
        assert texts(tmp_path, tmp_path / "page") == ["The fox."]
    (tmp_path / "a").write_text("<!-- -->" * 5000 + "no page")  # the search must stay linear
    assert texts(tmp_path, tmp_path / "a")[0].startswith("<!-- -->")
    (tmp_path / "a").write_text("The <b> key.\n<html> is how pages begin.")
    assert texts(tmp_path, tmp_path / "a") == ["The <b> key.\n<html> is how pages begin."]


def test_folders_and_globs(tmp_path, capsys):
    """A folder or a glob means its files of a known kind, and tells of others; no match is an
    error; a file that is named itself may be called anything."""
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.md", "deep/c.jsonl.gz", "deep/d.png", "E.TXT.XZ"):
        (tmp_path / name).write_bytes(b"")

    def names(source, kinds):
        return [path.replace(str(tmp_path), "") for path in find_files([source], kinds, "")]

    kinds = (".txt", ".md", ".jsonl")
    assert names(str(tmp_path), kinds) == ["/E.TXT.XZ", "/a.md", "/b.txt", "/deep/c.jsonl.gz"]
    assert f"{tmp_path}: 1 files of other kinds" in capsys.readouterr().out
    assert names(str(tmp_path), (".jsonl",)) == ["/deep/c.jsonl.gz"]
    assert names(f"{tmp_path}/*", kinds) == ["/E.TXT.XZ", "/a.md", "/b.txt"]
    assert names(f"{tmp_path}/deep/d.png", kinds) == ["/deep/d.png"]
    assert "nothing.txt" in one_line(names, "nothing.txt", kinds)
    assert "deep" in one_line(names, f"{tmp_path}/deep", (".html",))


# --------------------------------------------------------------------------------------------------
# Records: JSON, CSV, Parquet

def test_json_of_all_kinds(tmp_path, capsys):
    """Lines, lists and values one after another; bad records are counted, and named by line."""
    good = [{"text": f"page {i}"} for i in range(60)]
    path = write_lines(tmp_path / "a.jsonl", *good)
    path.write_text(path.read_text() + '\nnonsense\n{"text": 3}\n[1]\n')
    assert len(run(tmp_path, "text", path)) == 60
    said = capsys.readouterr().out
    assert "63 records, 60 written" in said and "left out: not JSON: 1 (line 62)" in said
    assert "in place of text: 1 (line 63)" in said and "not a JSON object: 1 (line 64)" in said
    (tmp_path / "b.json").write_text('[{"content": "three"}, {"content": "four"}]')
    assert texts(tmp_path, tmp_path / "b.json", "--text_field=content") == ["three", "four"]
    (tmp_path / "c.json").write_text('{"text": "five"}\n{"text":\n "six"}\n')  # C4 is like this
    assert texts(tmp_path, tmp_path / "c.json") == ["five", "six"]
    for damaged in ('[{"text": "one"},\n{"text": "two"},\n{"text": x}]', "{", "[" * 100_000,
                    "[" + "9" * 5000 + "]"):
        (tmp_path / "c.json").write_text(damaged)
        assert "c.json" in refused(tmp_path, "text", tmp_path / "c.json")
    (tmp_path / "c.json").write_text('[{"text": "one"},\n{"text": "two"},\n{"text": x}]')
    assert "behind record 2" in refused(tmp_path, "text", tmp_path / "c.json")


@pytest.mark.parametrize("text", [
    "[]", " [ ] ", '[{"a": "],[ 😀\\u00e9\\"]"}, 3, "x", [1, [2]], null, -1 , {}]',
    '[\n  {\n    "a": 1\n  }\n]\n', '{"a": [1]}', '"a"', "7", '[{"a": "' + "é" * 300 + '"}, {}]'])
def test_json_list_in_pieces(text):
    """A list has the items that it has as a whole, wherever it is cut within them."""
    whole = json.loads(text)
    for size in (3, 4, 7, 20, 99):
        found = list(read_values(io.StringIO(text), size))
        assert found == (whole if isinstance(whole, list) else [whole])


@pytest.mark.parametrize("text", [
    "[", '[{"a": 1}', '[{"a": 1', '[{"a": "1', "[1,", "[}]", "[1] 2", "[{'a': 1}]", "7]",
    '[{"a" 1}, {"a": 2}]' + " " * 99, '[{"a": 1}}, 3]'])
def test_damaged_json_list(text):
    for size in (2, 5, 200):
        with pytest.raises(ValueError):
            list(read_values(io.StringIO(text), size))


def test_damage_is_found_at_once():
    """A fault is told without reading all that stands behind it."""
    f = io.StringIO('[{"a" 1}, ' + '{"a": 1}, ' * 10**5)
    with pytest.raises(ValueError):
        list(read_values(f, 100))
    assert f.tell() < 1000


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.jsonl.gz"])
def test_memory_stays_bounded(tmp_path, name):
    """One record at a time stands in memory, even if all of them stand in a single line."""
    items = [f"{i} " + "é" * 1000 for i in range(5000)]
    path = tmp_path / name
    if name == "a.json":
        path.write_text(json.dumps([{"text": item} for item in items], ensure_ascii=False))
    elif name == "a.txt":
        path.write_text("<|endoftext|>".join(items))
    else:
        lines = "".join(json.dumps({"text": item}, ensure_ascii=False) + "\n" for item in items)
        path.write_bytes(gzip.compress(lines.encode(), 1))
    tracemalloc.start()
    main([str(path), "--as=text", f"--to={tmp_path / 'new.jsonl'}"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with open(tmp_path / "new.jsonl", encoding="utf-8") as f:
        assert [json.loads(line)["text"] for line in f] == items
    assert peak < 4e6 < os.path.getsize(tmp_path / "new.jsonl") / 2


def test_tables(tmp_path, capsys):
    """Rows of CSV with commas, semicolons or tabs, quoted lines included, are records; what no
    name stands for is told."""
    (tmp_path / "a.csv").write_text('prompt,response,id\nWhy?,"Because,\nso.",1\nHow?,So.,2,3\n')
    made = run(tmp_path, "demonstrations", tmp_path / "a.csv")
    assert [m["messages"][1]["content"] for m in made] == ["Because,\nso.", "So."]
    assert "id (2), cells without a name (1)" in capsys.readouterr().out
    for name, mark in (("b.csv", ";"), ("c.tsv", "\t")):
        (tmp_path / name).write_text(f"prompt{mark}n\nWhy, then?{mark}1\n")
        assert run(tmp_path, "prompts", tmp_path / name)[0]["prompt"] == "Why, then?"
    (tmp_path / "a.csv").write_text('prompt,n\n"' + "x" * (2**24 + 1))
    assert "a.csv" in refused(tmp_path, "prompts", tmp_path / "a.csv")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    rows = [{"prompt": f"Why {i}?", "chosen": [USER, ASSISTANT],
             "rejected": [USER, {"role": "assistant", "content": "No."}]} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert len(run(tmp_path, "comparisons", tmp_path / "a.parquet")) == 3
    (tmp_path / "a.parquet").write_bytes(b"no table")
    assert "a.parquet" in refused(tmp_path, "text", tmp_path / "a.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in refused(tmp_path, "text", tmp_path / "a.parquet")


def test_half_characters_are_replaced(tmp_path):
    """JSON may name half of a character; what is read can be written all the same."""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert texts(tmp_path, tmp_path / "a.jsonl") == ["a?b 😀"]


@pytest.mark.parametrize("bad, written", [(5, True), (6, False)])
def test_one_bad_record_in_twenty(tmp_path, bad, written):
    """More of them are the wrong file, however many good records other files hold."""
    records = [{"prompt": "Why?", "response": "So."}] * (100 - bad) + [{"prompt": "Why?"}] * bad
    path = write_lines(tmp_path / "a.jsonl", *records)
    other = write_lines(tmp_path / "b.jsonl", *records[:1] * 200)
    if written:
        assert len(run(tmp_path, "demonstrations", path, other)) == 295
    else:
        line = refused(tmp_path, "demonstrations", other, path)
        assert "a.jsonl: 6 of 100 records" in line and "line 95" in line


def test_wrong_file_is_not_read_to_its_end(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *[{"text": "no prompt"}] * 1000)
    assert "100 of 100 records" in refused(tmp_path, "prompts", path)


# --------------------------------------------------------------------------------------------------
# The command

def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text("mine")
    line = one_line(main, [f"{tmp_path}/a.txt", "--as=text", f"--to={tmp_path}/b.jsonl"])
    assert "b.jsonl is there already" in line and (tmp_path / "b.jsonl").read_text() == "mine"


@pytest.mark.parametrize("arguments, words", [
    (["a.txt"], "--as"), (["a.txt", "--as=poems", "--to=b"], "poems"),
    (["a.txt", "--as=text", "--to=b", "--sep=x"], "--sep"),
    (["a.txt", "--as=prompts", "--to=b", "--fields=one"], "two"),
    (["nowhere.txt", "--as=text", "--to=b"], "nowhere.txt")])
def test_wrong_options(arguments, words):
    assert words in one_line(main, arguments)


def test_as_a_command(tmp_path):
    """From anywhere: what was recognised, taken and left out, and an example."""
    write_lines(tmp_path / "a.jsonl", {"instruction": "Why?", "output": "Because.", "id": 7},
                {"instruction": "Why?", "output": ""})
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "data", "convert.py"), "a.jsonl",
         "--as=demonstrations", "--to=new.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    made = json.loads((tmp_path / "new.jsonl").read_text())
    assert made == {"messages": [USER, ASSISTANT]}
    for words in ("a.jsonl: Alpaca; 2 records, 1 written", "an empty text: 1 (line 2)",
                  "fields not used: id (1)", "Because."):
        assert words in done.stdout


def every_form():
    return {form for forms in convert.FORMS.values() for form in forms}


def test_help_lists_the_forms(capsys):
    """--help names every known form with the fields that tell it."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    names = {"ASK": ["prompt"], "ANSWER": ["response"], "RATING": ["helpfulness"], "TEXT": ["text"]}
    for form in every_form():
        assert f"\n    {convert.list_forms([form], names)}\n" in shown + "\n", form.name


def test_every_form_stands_in_the_table_of_results():
    """tests/RESULTS.md has a row for each known form, with its fields."""
    with open(os.path.join(ROOT, "tests", "RESULTS.md"), encoding="utf-8") as f:
        rows = [line.split("|") for line in f if line.startswith("| ")]
    names = {"ASK": "prompt", "ANSWER": "response", "RATING": "helpfulness", "TEXT": "text"}
    for form in every_form():
        fields = [names.get(need, need) for need in form.needs.split()]
        assert any(row[1].strip() == form.name and all(f'"{field}"' in row[2] for field in fields)
                   for row in rows), form.name


def test_unknown_form(tmp_path):
    """The line lists the fields found and the forms known, and says how to name others."""
    path = write_lines(tmp_path / "a.jsonl", {"frage": "Why?", "antwort": "So."})
    line = refused(tmp_path, "demonstrations", path)
    for words in ("1 of 1 records", "line 1", "frage, antwort", "Alpaca (instruction, output)",
                  "--fields"):
        assert words in line
    assert len(run(tmp_path, "demonstrations", path, "--fields=frage,antwort")) == 1


def test_empty_files(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(b"")
        assert name in refused(tmp_path, "text", tmp_path / name)


# --------------------------------------------------------------------------------------------------
# Demonstrations

def asks(content, answer="Because."):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}


@pytest.mark.parametrize("record, expected, form", [
    ({"prompt": "Why?", "response": "Because."}, [USER, ASSISTANT], "prompt and response"),
    ({"prompt": "Why?", "completion": "Because."}, [USER, ASSISTANT], "TRL"),
    ({"prompt": [USER], "completion": [ASSISTANT]}, [USER, ASSISTANT], "TRL"),
    ({"question": "Why?", "answer": "Because."}, [USER, ASSISTANT], "question and answer"),
    ({"system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
     [SYSTEM, USER, ASSISTANT], "prompt and response"),
    ({"instruction": "Why?", "input": "", "output": "Because."}, [USER, ASSISTANT], "Alpaca"),
    ({"instruction": "Sum", "input": "1, 2", "output": "3"}, asks("Sum\n\n1, 2", "3"), "Alpaca"),
    ({"instruction": "Why?", "output": "Because.", "system": "Be brief.",
      "history": [["What?", "So."]]}, [SYSTEM, *asks("What?", "So."), USER, ASSISTANT], "Alpaca"),
    ({"instruction": "Sum", "context": "1, 2", "response": "3", "category": "x"},
     asks("Sum\n\n1, 2", "3"), "Dolly"),
    ({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]},
     [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], "chat messages"),
    ({"system": "Be brief.", "messages": [USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT], "chat"),
    ({"messages": [{**SYSTEM, "role": "developer"}, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT],
     "chat messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why"}, {"text": "?"}]},
                   ASSISTANT]}, [USER, ASSISTANT], "chat messages"),
    ([USER, ASSISTANT], [USER, ASSISTANT], "chat messages"),
    ({"conversations": [{"from": "system", "value": "Be brief."},
                        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
     [SYSTEM, USER, ASSISTANT], "ShareGPT"),
    ({"messages": [USER, CALL, {"role": "tool", "content": "noon"}, ASSISTANT]},
     [USER, {"role": "assistant", "content": '[{"function": {"name": "clock"}}]'},
      {"role": "user", "content": "noon"}, ASSISTANT], "a tool's turn, read as the user's: 1")])
def test_demonstrations_of_all_forms(tmp_path, capsys, record, expected, form):
    """Every known form becomes messages; what it asks is the same for --as=prompts."""
    path = write_lines(tmp_path / "a.jsonl", record)
    assert run(tmp_path, "demonstrations", path) == [{"messages": expected}]
    assert form in capsys.readouterr().out
    made, = run(tmp_path, "prompts", path)
    asked = made["prompt"]
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    assert asked == expected[:-1]


def test_conversations_as_text(tmp_path, capsys):
    """Whoever has demonstrations alone gets the text for pretraining from them: all that is said,
    but for replies that are labelled as bad."""
    path = write_lines(tmp_path / "a.jsonl", {"question": "Why?", "answer": "Because."},
                       {"messages": [SYSTEM, USER, ASSISTANT]}, {"text": "Once."},
                       {"prompt": "Why?", "completion": "Go!", "label": False})
    assert texts(tmp_path, path) == ["Why?\n\nBecause.", "Be brief.\n\nWhy?\n\nBecause.", "Once."]
    assert "labelled as bad: 1 (line 4)" in capsys.readouterr().out


@pytest.mark.parametrize("record", [
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
     "rejected": "\n\nHuman: Why?\n\nAssistant: No"},
    {"prompt": "Why?", "responses": ["No.", "Because.", "Because!"], "scores": [1, 3, 3]},
    {"prompt": "Why?", "responses": ["No.", "Because."], "ranking": [[1], [0]]}])
def test_comparisons_as_demonstrations(tmp_path, capsys, record):
    """Whoever has comparisons alone fine-tunes on the best reply of each, and is told so."""
    path = write_lines(tmp_path / "a.jsonl", record)
    assert run(tmp_path, "demonstrations", path) == [{"messages": [USER, ASSISTANT]}]
    assert "a comparison, of which the best reply was taken: 1 (line 1)" in capsys.readouterr().out
    assert texts(tmp_path, path) == ["Why?\n\nBecause."]


@pytest.mark.parametrize("name", ["a", "a.txt", "a.gz"])
def test_records_under_any_name(tmp_path, name):
    """Lines of JSON are records, whatever their file is called: as text, too."""
    path = write_lines(tmp_path / name, {"text": "one"}, {"text": "two"})
    assert texts(tmp_path, path) == ["one", "two"]
    path.write_text('{"a set": of braces}\n{}\n')
    assert texts(tmp_path, path) == ['{"a set": of braces}\n{}']


@pytest.mark.parametrize("scores", [3, [1], [1, "good"]])
def test_comparisons_that_have_no_best_reply(tmp_path, scores):
    record = {"prompt": "Why?", "responses": ["a", "b"], "scores": scores}
    line = refused(tmp_path, "demonstrations", write_lines(tmp_path / "a.jsonl", record))
    assert "1 of 1 records cannot be read" in line


@pytest.mark.parametrize("record, fields, expected", [
    ({"frage": "Why?", "antwort": "Because."}, "frage,antwort", [USER, ASSISTANT]),
    ({"instruction": "Sum", "input": "Why?", "output": "Because."}, "input,output",
     [USER, ASSISTANT]),
    ({"context": "Why?", "answer": "Because.", "input": "Or?"}, "context,answer",
     asks("Why?\n\nOr?"))])
def test_named_fields(tmp_path, record, fields, expected):
    """Fields that are named come before those that are known."""
    path = write_lines(tmp_path / "a.jsonl", record)
    made = run(tmp_path, "demonstrations", path, f"--fields={fields}")
    assert made == [{"messages": expected}]
    made = run(tmp_path, "prompts", path, f"--fields={fields}")
    assert made[0]["prompt"] == expected[0]["content"]


@pytest.mark.parametrize("record, reason", [
    ({}, "no known form"), ({"prompt": "Why?"}, "no known form"), ("Why?", "not a JSON object"),
    ({"prompt": "", "response": "Because."}, "an empty text"),
    ({"prompt": "Why?", "response": 3}, "in place of text"),
    ({"prompt": "Why?", "response": None}, "no known form"),
    ({"messages": []}, "an empty conversation"), ({"messages": "Why?"}, "assistant's turn"),
    ({"messages": [USER]}, "assistant's turn"), ({"messages": [{}]}, "unknown role"),
    ({"messages": [USER, {"role": "robot", "content": "Beep."}]}, "'robot'"),
    ({"messages": [ASSISTANT]}, "nothing asks"),
    ({"messages": [SYSTEM, ASSISTANT]}, "nothing asks"),
    ({"messages": [USER, 3]}, "not an object"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "not text"),
    ({"instruction": "Why?", "output": "So.", "history": "x"}, "a history"),
    ({"instruction": "Why?", "output": "So.", "input": [1]}, "not text"),
    ({"prompt": "Why?", "completion": "So.", "label": False}, "labelled as bad")])
def test_no_demonstration(tmp_path, capsys, record, reason):
    """What is none is counted by what is wrong with it."""
    path = write_lines(tmp_path / "a.jsonl", record)
    line = refused(tmp_path, "demonstrations", path)
    assert "a.jsonl" in line and reason in line and reason in capsys.readouterr().out


def test_deep_nesting(tmp_path, capsys, monkeypatch):
    """Neither reading a record nor writing a part of it ends in a traceback, however deep it is."""
    lines = ['{"messages": [{"role": "assistant", "tool_calls": %s}]}' % ("[" * n + "]" * n)
             for n in range(700, 1000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "[" * 10**5 + "]" * 10**5]))
    assert "not JSON" in refused(tmp_path, "demonstrations", tmp_path / "a.jsonl")
    assert "301 records, 0 written" in capsys.readouterr().out

    def too_deep(content):
        raise RecursionError

    monkeypatch.setattr(convert, "as_content", too_deep)
    path = write_lines(tmp_path / "b.jsonl", {"text": "one"})
    assert "1 of 1 records cannot be read (line 1: nested too deeply)" in refused(
        tmp_path, "text", path)


# --------------------------------------------------------------------------------------------------
# Comparisons and prompts

HH = "\n\nHuman: Why?\n\nAssistant: {}\n\nHuman: Really?\n\nAssistant: {}"
HH_PROMPT = [USER, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Really?"}]
NO = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize("record, prompt, replies, ranking", [
    ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "Why?", ["So.", "No."], [[0], [1]]),
    ({"instruction": "Why?", "input": "", "output": "x", "chosen": "So.", "rejected": "No."},
     "Why?", ["So.", "No."], [[0], [1]]),
    ({"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "No."},
     [SYSTEM, USER], ["So.", "No."], [[0], [1]]),
    ({"chosen": HH.format("So.", "Yes."), "rejected": HH.format("So.", "No. Human: is fine")},
     HH_PROMPT, ["Yes.", "No. Human: is fine"], [[0], [1]]),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, NO]},
     "Why?", ["Because.", "No."], [[0], [1]]),
    ({"system": "Be brief.", "chosen": [USER, ASSISTANT], "rejected": [USER, NO]},
     [SYSTEM, USER], ["Because.", "No."], [[0], [1]]),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**NO, "id": 7}]},
     "Why?", ["Because.", "No."], [[0], [1]]),
    ({"prompt": "Why?", "chosen": [USER, ASSISTANT], "rejected": [USER, NO], "messages": [USER]},
     "Why?", ["Because.", "No."], [[0], [1]]),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "scores": [2, 5, 2]},
     "Why?", ["a", "b", "c"], [[1], [0, 2]]),
    ({"prompt": [USER], "responses": [{"text": "a"}, {"text": "b"}], "ranking": [[1], [0]]},
     "Why?", ["a", "b"], [[1], [0]]),
    ({"instruction": "Why?", "responses": ["a", "b"], "scores": ["9", "10"]},
     "Why?", ["a", "b"], [[1], [0]]),
    ({"prompt": "Why?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]},
     "Why?", ["a", "b"], [[1], [0]]),
    ({"instruction": "Why?", "completions": [{"response": "a", "overall_score": 7.5, "model": "m"},
                                             {"response": "b", "overall_score": 9}]},
     "Why?", ["a", "b"], [[1], [0]]),
    ({"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": -3},
     "Why?", ["a", "b"], [[0], [1]]),
    ({"system": "Be brief.", "prompt": "Why?", "response_1": "a", "response_2": "b",
      "preference_strength": "1"}, [SYSTEM, USER], ["a", "b"], [[1], [0]])])
def test_comparisons_of_all_forms(tmp_path, record, prompt, replies, ranking):
    """Chosen and rejected, with a prompt or as two transcripts; rated and ranked lists with ties;
    under any name of the prompt's field. What was made can be read again."""
    path = write_lines(tmp_path / "a.jsonl", record)
    made, = run(tmp_path, "comparisons", path)
    expected = {"prompt": prompt, "responses": [{"text": reply} for reply in replies],
                "ranking": ranking, "annotator": "people", "id": made["id"]}
    assert made == expected
    assert run(tmp_path, "prompts", path) == [{"id": made["id"], "prompt": prompt}]
    assert run(tmp_path, "comparisons", write_lines(tmp_path / "b.jsonl", made)) == [made]
    if "prompt" in record:
        record = {("frage" if name == "prompt" else name): value for name, value in record.items()}
        path = write_lines(tmp_path / "a.jsonl", record)
        assert run(tmp_path, "comparisons", path, "--fields=frage,antwort") == [made]


@pytest.mark.parametrize("record, reason", [
    ({"prompt": "Why?", "chosen": "So.", "rejected": "So."}, "two equal replies"),
    ({"prompt": "Why?", "chosen": "So.", "rejected": " "}, "an empty reply"),
    ({"chosen": HH.format("So.", "Yes."), "rejected": HH.format("No.", "Yes!")},
     "two different prompts"),
    ({"chosen": HH.format("So.", ""), "rejected": HH.format("So.", "Yes!")}, "an empty text"),
    ({"chosen": HH.format("So.", "Yes.") + "\n\nHuman: Oh.", "rejected": HH.format("So.", "No.")},
     "assistant's turn"),
    ({"chosen": [USER], "rejected": [USER]}, "assistant's turn"),
    ({"chosen": [ASSISTANT], "rejected": [NO]}, "user's turn"),
    ({"prompt": "Why?", "responses": ["a", "b"], "scores": [3, 3]}, "all replies are tied"),
    ({"prompt": "Why?", "responses": ["a", " ", "a"], "scores": [1, 2, 3]}, "an empty reply"),
    ({"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": 0},
     "all replies are tied"),
    ({"message_tree_id": "7", "prompt": {"text": "Why?", "role": "prompter", "deleted": True}},
     "a tree that begins with a deleted or empty message"),
    ({"prompt": "Why?", "completion": "a", "label": True}, "nothing to compare")])
def test_comparisons_left_out_by_rule(tmp_path, record, reason):
    """Equal, empty and tied replies and different prompts say nothing about preference: each has
    its rule, is counted by it, and is no bad record."""
    line = refused(tmp_path, "comparisons", write_lines(tmp_path / "a.jsonl", record))
    assert reason in line and "no record can be used" in line
    good = {"prompt": "How?", "chosen": "So.", "rejected": "No."}
    assert len(run(tmp_path, "comparisons", write_lines(tmp_path / "a.jsonl", record, good))) == 1


@pytest.mark.parametrize("record", [
    {}, {"chosen": "a"}, {"chosen": 1, "rejected": 2}, {"chosen": "a", "rejected": "b"},
    {"prompt": 3, "responses": ["a", "b"], "scores": [1, 2]}, {"responses": 3, "prompt": "a"},
    {"prompt": "a", "chosen": 1, "rejected": "b"},
    {"chosen": "Yes." + HH, "rejected": "Yes." + HH + "!"},
    {"prompt": "a", "responses": ["a", "b"], "scores": [10**400, 1]},
    {"prompt": "a", "responses": ["a", "b"], "scores": [float("nan"), 1]},
    {"prompt": "a", "responses": ["a", "b"], "scores": [1]},
    {"prompt": "a", "responses": ["a", 2], "scores": [1, 2]},
    {"prompt": "a", "responses": ["a", "b"], "ranking": [[0]]},
    {"prompt": "a", "responses": ["a", "b"], "ranking": [[0], [1, 1]]},
    {"prompt": "a", "responses": ["a", "b"], "ranking": [1, 0]},
    {"prompt": "a", "response_1": "a", "response_2": "b", "preference_strength": "much"},
    {"message_tree_id": "7", "prompt": "Why?"},
    {"message_tree_id": "7", "prompt": {"text": 3, "role": "prompter"}},
    {"message_tree_id": "7", "prompt": {"text": "Why?", "role": "prompter", "replies": 3}},
    {"message_tree_id": "7", "prompt": {"text": "Why?", "role": "prompter", "replies": ["So."]}},
    {"message_tree_id": "7", "prompt": {"text": "Why?", "role": "assistant"}},
    {"message_tree_id": "7", "prompt": {"text": "Why?", "role": "prompter", "replies": [
        {"text": "So.", "role": "prompter"}]}},
    {"message_tree_id": "7", "prompt": {"text": "Why?", "role": "prompter", "replies": [
        {"text": "So.", "role": "assistant", "rank": "best"}]}}])
def test_no_comparison(tmp_path, record):
    """What is damaged is a bad record."""
    line = refused(tmp_path, "comparisons", write_lines(tmp_path / "a.jsonl", record))
    assert "1 of 1 records cannot be read" in line


def test_longer_lists_lose_single_replies(tmp_path, capsys):
    """Of a longer list an empty reply, or one that repeats another, is left out alone."""
    record = {"prompt": "Why?", "responses": ["a", "", "b", "a", "c"], "scores": [1, 9, 2, 3, 1]}
    made, = run(tmp_path, "comparisons", write_lines(tmp_path / "a.jsonl", record))
    assert [reply["text"] for reply in made["responses"]] == ["a", "b", "c"]
    assert made["ranking"] == [[1], [0, 2]]
    assert "left out of a longer list: 2 (line 1; line 1)" in capsys.readouterr().out


def test_single_rated_replies_are_compared(tmp_path, capsys):
    """Replies that are rated one by one are compared by prompt, wherever they stand; the rating's
    field can be named."""
    rated = [("Why?", "a", 1), ("How?", "b", 4), ("Why?", "c", 3), ("Why?", "d", 1),
             ("So?", "e", 2)]
    records = [{"prompt": prompt, "response": reply, "helpfulness": score, "verbosity": -score}
               for prompt, reply, score in rated]
    path = write_lines(tmp_path / "a.jsonl", *records)
    made, = run(tmp_path, "comparisons", path)
    assert made["prompt"] == "Why?" and made["ranking"] == [[1], [0, 2]]
    assert [reply["text"] for reply in made["responses"]] == ["a", "c", "d"]
    said = capsys.readouterr().out
    assert "HelpSteer; 5 records, 1 written" in said
    assert "nothing to compare: 2 (line 2; line 5)" in said and "verbosity (5)" in said
    made, = run(tmp_path, "comparisons", path, "--rating=verbosity")
    assert made["ranking"] == [[0, 2], [1]]
    labelled = [{"prompt": "Why?", "completion": reply, "label": reply == "b"} for reply in "ab"]
    made, = run(tmp_path, "comparisons", write_lines(tmp_path / "b.jsonl", *labelled))
    assert made["ranking"] == [[1], [0]]


def test_strength_of_a_preference(tmp_path, capsys):
    """Of its strength only the side is used, and the report says so."""
    records = [{"prompt": f"Why {n}?", "response_1": "a", "response_2": "b", "split": "train",
                "preference_strength": n} for n in (-3, -1, 0, 1, 3)]
    path = write_lines(tmp_path / "a.jsonl", *records)
    made = run(tmp_path, "comparisons", path)
    assert [record["ranking"] for record in made] == [[[0], [1]]] * 2 + [[[1], [0]]] * 2
    said = capsys.readouterr().out
    assert "HelpSteer2-preference; 5 records, 4 written" in said
    assert "strength, of which only the sign was used: 5" in said
    assert "all replies are tied: 1 (line 3)" in said and "fields not used: split (5)" in said
    made = run(tmp_path, "demonstrations", write_lines(tmp_path / "b.jsonl", records[4]))
    assert made == [{"messages": asks("Why 3?", "b")}]


def message(text, *replies, **fields):
    """A message of a tree; one with a rank, if only null, is the assistant's."""
    role = "assistant" if "rank" in fields else "prompter"
    return {"text": text, "role": role, "lang": "en", "replies": list(replies), **fields}


def turns(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


TREE = {"message_tree_id": "7", "tree_state": "ready", "context": "web", "prompt": message(
    "Why?",
    message("No.", message("No?", message("x", rank=1), message("y", rank=0)), rank=1),
    message("Because.",
            message("And?", message("so", message("Is it?", message("q", rank=1),
                                                  message("p", rank=0)), rank=None),
                    message("thus", rank=None)),
            message("Or?", message("b", rank=1), message("a", rank=0), message("c", rank=None),
                    message("b", rank=2)),
            message("Oh."), rank=0),
    message("", message("What?", message("z", rank=0)), rank=2),
    message("Spam", rank=3, deleted=True), rank=None, role="prompter")}


def test_tree_as_comparisons(tmp_path, capsys):
    """Each of the user's turns with two ranked replies or more is a comparison, in whatever part of
    the tree it stands; what is left out is counted."""
    path = write_lines(tmp_path / "a.jsonl", TREE)
    made = run(tmp_path, "comparisons", path)
    assert [(record["prompt"], [reply["text"] for reply in record["responses"]], record["ranking"])
            for record in made] == [
        ("Why?", ["No.", "Because."], [[1], [0]]),
        (turns("Why?", "No.", "No?"), ["x", "y"], [[1], [0]]),
        (turns("Why?", "Because.", "And?", "so", "Is it?"), ["q", "p"], [[1], [0]]),
        (turns("Why?", "Because.", "Or?"), ["b", "a"], [[1], [0]])]
    said = capsys.readouterr().out
    for words in ("OpenAssistant; 1 records, 4 written",
                  "left out: a message that is deleted or empty, or below such a one: 4 (",
                  "left out: a reply without a rank: 3 (",
                  "left out: a prompt with fewer than two replies: nothing to compare: 2 (",
                  "an empty or repeated reply, left out of a longer list: 1 (",
                  "fields not used: tree_state (1), context (1), lang of a turn (18)\n"):
        assert words in said, words
    assert run(tmp_path, "comparisons", write_lines(tmp_path / "b.jsonl", *made)) == made


def test_tree_as_conversations(tmp_path, capsys):
    """Along the best replies, or the first without ranks, each way of the user's is a demonstration
    and a text, up to the last reply; the first turn is a prompt."""
    path = write_lines(tmp_path / "a.jsonl", TREE)
    ways = [("Why?", "Because.", "And?", "so", "Is it?", "p"), ("Why?", "Because.", "Or?", "a")]
    made = run(tmp_path, "demonstrations", path)
    assert made == [{"messages": turns(*way)} for way in ways]
    said = capsys.readouterr().out
    for words in ("1 records, 2 written", "deleted or empty, or below such a one: 4 (",
                  "left out: a reply that is not the best, and all below it: 6 (",
                  "left out: a user's turn that nobody answers: 1 (line 1)"):
        assert words in said, words
    assert texts(tmp_path, path) == ["\n\n".join(way) for way in ways]
    capsys.readouterr()
    assert [record["prompt"] for record in run(tmp_path, "prompts", path)] == ["Why?"]
    assert "a tree, of which the first turn was taken: 1 (line 1)" in capsys.readouterr().out
    short = {"message_tree_id": "8", "prompt": message("Why?", message(
        "Because.", message("And?", message(" ", rank=0)), message("Oh.", replies=None), rank=0))}
    made = run(tmp_path, "demonstrations", write_lines(tmp_path / "b.jsonl", short))
    assert made == [{"messages": [USER, ASSISTANT]}]
    alone = {"message_tree_id": "9", "prompt": {"text": "Why?", "role": "prompter", "rank": 1}}
    path = write_lines(tmp_path / "c.jsonl", alone)
    assert "nobody answers: 1" in refused(tmp_path, "demonstrations", path)
    assert run(tmp_path, "prompts", path)[0]["prompt"] == "Why?"
    assert "rank of a turn (1)" in capsys.readouterr().out


def test_prompts(tmp_path, capsys):
    """A prompt is taken once, as text if it is one, with an id that depends on its text alone."""
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "Why?", "n": 1}, {"question": "How?"},
                       {"messages": [USER, ASSISTANT, USER]}, {"prompt": [{**USER, "id": 7}]})
    made = run(tmp_path, "prompts", path)
    assert [record["prompt"] for record in made] == ["Why?", "How?", [USER, ASSISTANT, USER]]
    assert len({record["id"] for record in made}) == 3
    said = capsys.readouterr().out
    assert "a prompt that came before: 1 (line 4)" in said
    assert "fields not used: n (1), id of a turn (1)" in said
    line = refused(tmp_path, "prompts", write_lines(tmp_path / "b.jsonl", {"prompt": [SYSTEM]}))
    assert "user's turn" in line


# --------------------------------------------------------------------------------------------------
# Downloads

CONTENT = np.random.default_rng(0).bytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.asked.append(start)
        if self.path == "/missing":
            return self.send_error(404)
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if "If-Range" in self.headers and self.headers["If-Range"] not in server.version.values():
            start = 0  # the file is another one by now
        if self.path == "/stubborn":
            start = 0  # it knows no ranges
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        for name, value in server.version.items():
            self.send_header(name, value)
        self.end_headers()
        breaks = self.path in ("/broken", "/stubborn") and len(server.asked) == 1
        self.wfile.write(CONTENT[start:100_000 if breaks else None])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A web server whose first answer to /broken and /stubborn breaks off; .asked lists where the
    ranges begin that it was asked for, .version holds the headers that tell its file's version."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.version = [], {}
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def fetch(url, folder):
    path, = find_files([url], (), str(folder))
    return path


def read(path):
    with open(path, "rb") as f:
        return f.read()


def test_download(server, tmp_path, capsys):
    """A file is fetched once, and never again."""
    path = fetch(f"{server.url}/a.txt", tmp_path / "d")
    assert read(path) == CONTENT and path.endswith("a.txt")
    assert "0.3 of 0.3 MB" in capsys.readouterr().out
    assert fetch(f"{server.url}/a.txt", tmp_path / "d") == path and len(server.asked) == 1


def test_download_that_ends_early(tmp_path):
    """Fewer bytes than were promised are not a file, even if the connection ends in good order."""
    response = types.SimpleNamespace(headers={"Content-Length": "10"},
                                     iter_content=lambda size: [b"four"])
    with pytest.raises(OSError, match="4 of 10"):
        receive(response, tmp_path / "part", tmp_path / "version", 0)


@pytest.mark.parametrize("name", ["broken", "stubborn"])
def test_download_continues_where_it_broke_off(server, tmp_path, name):
    """A broken download leaves no file under its final name; run again, it asks for the rest alone,
    and copes with a server that sends everything."""
    line = one_line(fetch, f"{server.url}/{name}", tmp_path)
    assert name in line and "again" in line
    assert [path.name[7:] for path in tmp_path.iterdir()] == [f"{name}.part"]
    path = fetch(f"{server.url}/{name}", tmp_path)
    assert read(path) == CONTENT and server.asked == [0, 65_536]  # the whole blocks of 100,000
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("before, now", [
    ({"ETag": '"a"'}, {"ETag": '"b"'}),
    ({"ETag": 'W/"a"', "Last-Modified": "Mon"}, {"Last-Modified": "Tue"}),
    ({"ETag": '"a"', "Last-Modified": "Mon"}, {"ETag": '"b"', "Last-Modified": "Tue"})])
def test_parts_of_two_files_are_never_joined(server, tmp_path, before, now):
    """Where the server's file is of another version than the part, the download begins again;
    else it continues."""
    for version in (before, now):
        server.version = before
        server.asked.clear()
        one_line(fetch, f"{server.url}/broken", tmp_path)
        part, = tmp_path.glob("*.part")
        part.write_bytes(b"x" * 100_000)  # to tell the part from what is sent
        server.version = version
        path = fetch(f"{server.url}/broken", tmp_path)
        assert read(path) == (CONTENT if version is now else b"x" * 100_000 + CONTENT[100_000:])
        assert [str(path) for path in tmp_path.iterdir()] == [path]
        os.remove(path)


@pytest.mark.parametrize("address, words", [
    ("{}/a#md5=0", "sha256="), ("{}/a#sha256=12", "64 digits"), ("http://[::1/a", "again"),
    ("{}/missing", "404")])
def test_address_that_cannot_be_used(server, tmp_path, address, words):
    assert words in one_line(fetch, address.format(server.url), tmp_path)
    assert not list(tmp_path.iterdir())


def test_download_is_checked(server, tmp_path):
    """A file with another SHA-256 than that of the URL is not kept; with the right one it is."""
    assert "SHA-256" in one_line(fetch, f"{server.url}/a#sha256={'0' * 64}", tmp_path)
    assert not list(tmp_path.iterdir())
    digest = hashlib.sha256(CONTENT).hexdigest()
    path = fetch(f"{server.url}/a#sha256={digest}", tmp_path)
    assert read(path) == CONTENT
    with open(path, "ab") as f:
        f.write(b"more")
    assert "SHA-256" in one_line(fetch, f"{server.url}/a#sha256={digest}", tmp_path)


@pytest.mark.parametrize("extra", [b"", b"of another file"])
def test_download_that_was_killed_at_its_end(server, tmp_path, extra):
    """A part that is whole gets its name; a longer one is thrown away, and the next run mends
    it."""
    url = f"{server.url}/ä b.txt"
    path = fetch(url, tmp_path)
    os.rename(path, path + ".part")
    with open(path + ".part", "ab") as f:
        f.write(extra)
    if extra:
        assert "again" in one_line(fetch, url, tmp_path)
    assert read(fetch(url, tmp_path)) == CONTENT and len(list(tmp_path.iterdir())) == 1


def test_url_as_a_file(server, tmp_path, monkeypatch):
    """The command reads what it has fetched, and keeps it beside what it writes."""
    monkeypatch.setattr(sys.modules[__name__], "CONTENT", b'{"text": "The fox."}\n')
    assert texts(tmp_path, f"{server.url}/a.jsonl") == ["The fox."]
    assert len(list((tmp_path / "made" / "downloads").iterdir())) == 1
