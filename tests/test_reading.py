"""What people have: their files, in whatever form, encoding and state of repair, from disk or over HTTP."""

import gzip
import hashlib
import http.server
import json
import os
import threading
import tracemalloc

import numpy as np
import pytest

import prepare
from prepare import (PrepareConfig, Problems, as_comparison, as_messages, cut_documents, find_files, load_tokenizer,
                     load_tokens, prompt_ids, read_documents, read_jsonl, read_lines, read_values, read_records, render)
from test_prepare import one_line, run_prepare


def documents(*paths, **changes):
    problems = Problems()
    found = [text for text, _ in read_documents(map(str, paths), PrepareConfig(**changes), problems)]
    return found, problems


# ---------------------------------------------------------------------------------------------------------------------
# Text

@pytest.mark.parametrize("data, text, note", [
    ("Größe\nzwei\n".encode(), "Größe\nzwei\n", ""), (b"\xef\xbb\xbfeins\n", "eins\n", ""),
    ("Größe\n".encode("latin-1"), "Größe\n", "latin-1"), ("Größe\n".encode("utf-16"), "Größe\n", ""),
    (b'<meta charset="cp1251">\n' + "мир\n".encode("cp1251"), '<meta charset="cp1251">\nмир\n', "cp1251"),
    (b'<meta charset="klingon">\n\xe4\n', '<meta charset="klingon">\nä\n', "latin-1"),
    (b'<meta charset="utf-8">\n\xe4\x81\n', '<meta charset="utf-8">\nä\x81\n', "latin-1"),
    ("“it’s” – €".encode("cp1252"), "“it’s” – €", "latin-1"),
    (b"encoding: KOI8-R\n" + "мир".encode("koi8-r"), "encoding: KOI8-R\nмир", "KOI8-R"),
    (b"charset=gbk " + 9 * "世界很大".encode("gbk"), "charset=gbk " + 9 * "世界很大", "gbk"),
    ("“It’s – good” ".encode() * 3 + b"\xff", "“It’s – good” " * 3 + "\ufffd", "damaged"),
    (b"charset=hex \xe4", "charset=hex ä", "latin-1"),
    (b"a\r\nb\x00c\r\n", "a\r\nb\x00c\r\n", ""), (b"", "", "")])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("longest", [-1, 1])
def test_encodings(tmp_path, data, text, note, packed, longest):
    """UTF-8 with and without its mark, UTF-16, what the file declares, Latin-1: with a note where it was guessed. Pieces
    of lines, however short, end between two characters. That a file is packed is seen by its content."""
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert prepare.size_of(str(path)) == len(data)
    problems = Problems()
    if longest == 1:
        longest = dict(damaged=-1, gbk=20).get(note, 1)             # these pieces are judged as a whole
    lines = list(read_lines(str(path), problems, longest))
    assert "".join(lines) == text and (longest != 1 or max(map(len, lines), default=0) <= 2)
    assert not problems.bad and (note in problems.examples[0] if note else not problems.examples)


def test_damaged_gzip_is_named(tmp_path):
    """A packed file that was cut off ends in one line with its name."""
    whole = gzip.compress(np.random.default_rng(0).bytes(5000))
    (tmp_path / "a.txt.gz").write_bytes(whole[:len(whole) // 2])
    assert "a.txt.gz" in one_line(list, read_lines(str(tmp_path / "a.txt.gz"), Problems()))


@pytest.mark.parametrize("separator, expected", [
    ("<|endoftext|>", ["one\n\ntwo ", "\nthree\n"]), ("", ["one\n", "two <|endoftext|>\nthree\n"])])
def test_documents_of_a_text_file(separator, expected):
    """A file is cut at its separator, also within a line, or at blank lines."""
    lines = ["one\n", "\n", "two <|endoftext|>\n", "three\n"]
    assert [d for d in cut_documents(lines, separator) if d.strip()] == expected


@pytest.mark.parametrize("lines", [["0123456789\n"] * 1000, ["0123456789"] * 1000 + ["\n", "end"]])
def test_book_of_any_length(lines):
    """Text without a separator is cut all the same, so that memory stays bounded; no character is lost."""
    parts = list(cut_documents(lines, "<|endoftext|>", longest=500))
    assert "".join(parts) == "".join(lines) and max(map(len, parts)) < 520 and len(parts) > 15


@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 14, 40])
def test_separators_in_a_line_that_comes_in_pieces(size):
    """A line may be too long to be read at once: a separator that is cut is one all the same, half of one is text."""
    text = "one<|endoftext|>two <|end <|endof<|endoftext|><three<|endoftext|>four <|endoftex"
    for text, separator in ((text, "<|endoftext|>"), ("one ---two-- --- - ----- six\n---", "---")):
        pieces = [text[i:i + size] for i in range(0, len(text), size)]
        assert list(cut_documents(pieces, separator)) == text.split(separator)


def test_memory_of_a_single_line(tmp_path):
    """Documents in a single line of any length are read a piece at a time."""
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"{i} " + "é" * 1000 for i in range(5000)))
    tracemalloc.start()
    n = 0
    for i, (text, _) in enumerate(read_documents([str(tmp_path / "a.txt")], PrepareConfig(), Problems())):
        assert text == f"{i} " + "é" * 1000
        n += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 5000 and peak < 2e6


def test_json_of_all_kinds(tmp_path):
    """Lines and lists, the field by its name; bad records are named with file and line, and counted."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\nnonsense\n{"text": 3}\n[1]\n{"text": "two"}\n')
    (tmp_path / "b.json").write_text('[{"text": "three"}, {"content": "four"}]')
    found, problems = documents(tmp_path / "a.jsonl", tmp_path / "b.json")
    assert found == ["one", "two", "three"] and problems.records == 7 and problems.bad == 4
    assert {e.split(":")[0].split("/")[-1] for e in problems.examples} == {
        "a.jsonl, line 3", "a.jsonl, line 4", "a.jsonl, line 5", "b.json, record 2"}
    assert documents(tmp_path / "b.json", text_field="content")[0] == ["four"]
    (tmp_path / "lines.json").write_text('{"text": "five"}\n{"text":\n "six"}\n')  # as C4 is published
    assert documents(tmp_path / "lines.json")[0] == ["five", "six"]
    (tmp_path / "c.json").write_text('[{"text": "one"},\n{"text": "two"},\n{"text": x}]')
    assert "c.json, record 2" in one_line(documents, tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    assert "c.json" in one_line(documents, tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[" * 100_000)
    assert "c.json" in one_line(documents, tmp_path / "c.json")


@pytest.mark.parametrize("text", [
    "[]", " [ ] ", '[{"a": "],[ 😀\\u00e9\\"]"}, 3, "x", [1, [2]], null, -1.5e3 , {}]', '[\n  {\n    "a": 1\n  }\n]\n',
    '{"a": [1]}', '"a"', "7"])
def test_json_list_in_pieces(text):
    """A list that comes in pieces, wherever it is cut within its items, has the items that it has as a whole; anything
    else is a list of itself alone."""
    whole = json.loads(text)
    for size in (3, 4, 7, 20, 99):
        if size > 6 or "1.5e3" not in text:                         # a number has no end of its own
            pieces = iter([text[i:i + size] for i in range(0, len(text), size)])
            assert list(read_values(pieces)) == (whole if isinstance(whole, list) else [whole])


@pytest.mark.parametrize("text", ["[", '[{"a": 1}', '[{"a": 1', '[{"a": "1', "[1,", "[}]", "[1] 2", "[{'a': 1}]",
                                  '[{"a" 1}, {"a": 2}]' + " " * 99, "7]", '[{"a": 1}}, 3]'])
def test_damaged_json_list(text):
    """What is cut off or damaged is an error, whether it comes at once or in pieces."""
    for size in (2, 5, 200):
        with pytest.raises(ValueError):
            list(read_values(iter([text[i:i + size] for i in range(0, len(text), size)])))


def test_memory_of_a_large_json_list(tmp_path):
    """One item at a time stands in memory, though all stand in a single line; letters of two bytes are not cut."""
    items = [dict(text=f"{i} " + "é" * 1000) for i in range(5000)]
    (tmp_path / "a.json").write_text(json.dumps(items, ensure_ascii=False))
    tracemalloc.start()
    problems, n = Problems(), 0
    for (where, record), item in zip(read_records(str(tmp_path / "a.json"), problems), items, strict=True):
        assert record == item and where.endswith(f"record {(n := n + 1)}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not problems.counts and peak < 2e6 < os.path.getsize(tmp_path / "a.json") / 5


def test_too_many_bad_records_are_an_error():
    """One bad record in twenty is an accident, more are the wrong file, however many good ones other files hold."""
    problems = Problems()
    for n in (5, 6):
        problems.records = 100
        for i in range(n):
            problems.note(f"a, line {i}", "not JSON")
        if n == 5:
            problems.judge()
    message = one_line(problems.judge)
    assert all(words in message for words in ("a, line 5", "6 of 100", "--text_field"))
    problems.note("a, line 1", "not JSON")
    problems.note("b, line 9", "two equal replies", bad=False)  # is by rule, not bad
    assert "a, line 1" in problems.latest


def test_demonstrations_are_judged_by_themselves(tmp_path):
    """A file of demonstrations that cannot be read is an error, though there is good text in plenty."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"The fox number {i} is here."}) + "\n" for i in range(99)))
    (tmp_path / "b.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    message = one_line(run_prepare, tmp_path / "out", f"--text={tmp_path}/a.jsonl", f"--demonstrations={tmp_path}/b.jsonl")
    assert "1 of 1 records" in message and "b.jsonl, line 1" in message and "--fields" in message


def test_half_characters_are_replaced(tmp_path):
    """JSON may name half of a character; what is read can be written again (catches text that no encoding takes)."""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert documents(tmp_path / "a.jsonl")[0] == ["a?b 😀"]


def test_html_becomes_text(tmp_path):
    """Words stay, markup, scripts and styles go; blocks are lines of their own, entities are characters."""
    (tmp_path / "a.html").write_text(
        "<!doctype html><html><head><title>No</title><style>p {}</style></head><body><h1>The  Fox</h1><p>He <b>ran</b>"
        " &amp; hid.</p><script>if (a < b) alert('<p>')</script><p>It\nrained.<br>All day.</body>")
    text, = documents(tmp_path / "a.html")[0]
    assert prepare.repair(text) == "The Fox\n\nHe ran & hid.\n\nIt rained.\nAll day."
    (tmp_path / "b.html").write_text("<head><meta charset=undefined><title>No</title><body>No head \xe9nds.", "latin-1")
    assert prepare.repair(documents(tmp_path / "b.html")[0][0]) == "No head énds."  # and the encoding is none


def test_html_without_a_suffix(tmp_path):
    """A page that was saved under a name without a suffix, as by a download, is HTML all the same; a text is text."""
    for i, begun in enumerate(("\n\n<!doctype html>", "<!-- a --><!-- <b> -->\n<!DOCTYPE  html>", '<?xml version="1"?><HTML>')):
        (tmp_path / f"page{i}").write_text(begun + "<p>The <b>fox</b>.")
        assert documents(tmp_path / f"page{i}")[0][0].strip() == "The fox."
    (tmp_path / "notes").write_text("<!-- -->" * 5000 + "no page")  # is not read in two to the 5000 ways
    assert documents(tmp_path / "notes")[0][0].startswith("<!-- -->")
    (tmp_path / "Fox").write_text("<!DOCTYPE html>\n<p>The <b>fox</b>.")
    (tmp_path / "hen.txt").write_text("The <b> key.\n<html> is how pages begin.")
    (tmp_path / "OWL.TXT.GZ").write_bytes(gzip.compress(b"The owl."))
    assert [d.strip() for d in documents(*(tmp_path / n for n in ("Fox", "hen.txt", "OWL.TXT.GZ")))[0]] == [
        "The fox.", "The <b> key.\n<html> is how pages begin.", "The owl."]
    assert prepare.size_of(str(tmp_path / "OWL.TXT.GZ")) == 8


def test_folders_globs_and_lists(tmp_path, capsys):
    """A folder means all files of a known kind in it; sources are separated by commas; no match is an error."""
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.md", "deep/c.jsonl.gz", "deep/d.png"):
        (tmp_path / name).write_bytes(b"")
    names = lambda s: [p.replace(str(tmp_path), "") for p in find_files(s, "")]  # noqa: E731
    assert names(str(tmp_path)) == ["/a.md", "/b.txt", "/deep/c.jsonl.gz"]
    assert names(f"{tmp_path}/*.txt, {tmp_path}/a.md") == ["/b.txt", "/a.md"]
    assert len(find_files(str(tmp_path), "", (".json", ".jsonl"))) == 1  # of records
    assert "nothing.txt" in one_line(find_files, f"{tmp_path}/a.md,nothing.txt", "")
    assert names(f"{tmp_path}/*") == ["/a.md", "/b.txt"] and names(f"{tmp_path}/deep") == ["/deep/c.jsonl.gz"]
    assert f"{tmp_path}/deep: 1 files of other kinds left out" in capsys.readouterr().out
    assert prepare.size_of(f"{tmp_path}/deep/c.jsonl.gz") == 0


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def server(tmp_path):
    """A web server whose first answer to /broken breaks off in the middle; .asked lists the ranges it was asked for."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.server.asked.append(start)
            if start >= len(CONTENT):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if self.path == "/missing":
                return self.send_error(404)
            if self.path == "/stubborn":
                start = 0                                           # it knows no ranges
            version = self.server.version
            if "If-Range" in self.headers and self.headers["If-Range"] not in version.values():
                start = 0                                           # the file is another one now
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            for name, value in version.items():
                self.send_header(name, value)
            self.end_headers()
            breaks = self.path == "/broken" and len(self.server.asked) == 1 or self.path == "/stubborn" and \
                len(self.server.asked) == 1
            self.wfile.write(CONTENT[start:100_000 if breaks else None])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.version, server.url = [], {}, f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read(path):
    with open(path, "rb") as f:
        return f.read()


def test_download(server, tmp_path):
    """A file is fetched once, and never again."""
    path, = find_files(f"{server.url}/a.txt", str(tmp_path / "d"))
    assert read(path) == CONTENT and path.endswith("a.txt")
    assert find_files(f"{server.url}/a.txt", str(tmp_path / "d")) == [path] and len(server.asked) == 1


@pytest.mark.parametrize("name, asked", [("broken", [0, 100_000]), ("stubborn", [0, 100_000])])
def test_download_goes_on_where_it_broke_off(server, tmp_path, name, asked):
    """A broken download leaves no file under the final name; run again, it asks for the rest alone, and copes with a
    server that sends everything."""
    message = one_line(find_files, f"{server.url}/{name}", str(tmp_path))
    assert name in message and "again" in message
    assert [p.name[7:] for p in tmp_path.iterdir()] == [f"{name}.part"]
    path, = find_files(f"{server.url}/{name}", str(tmp_path))
    assert read(path) == CONTENT and server.asked == asked and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("before, now", [
    (dict(ETag='"a"'), dict(ETag='"b"')), (dict(ETag='W/"a"', **{"Last-Modified": "Mon"}), {"Last-Modified": "Tue"}),
    (dict(ETag='"a"', **{"Last-Modified": "Mon"}), dict(ETag='"b"', **{"Last-Modified": "Tue"}))])
def test_parts_of_two_files_are_never_joined(server, tmp_path, before, now):
    """The server's name for the version of a file lies beside a part of it; where that has changed meanwhile, the download
    begins again, else it goes on."""
    for version in (before, now):
        server.version = before
        server.asked.clear()
        one_line(find_files, f"{server.url}/broken", str(tmp_path))
        part, = tmp_path.glob("*.part")
        part.write_bytes(b"x" * 100_000)                            # what the file began with then
        server.version = version
        path, = find_files(f"{server.url}/broken", str(tmp_path))
        assert read(path) == (CONTENT if version is now else b"x" * 100_000 + CONTENT[100_000:])
        assert [str(p) for p in tmp_path.iterdir()] == [path]
        os.remove(path)


@pytest.mark.parametrize("url, words", [("/a#md5=0", "sha256="), ("/a#sha256=12", "64 digits"), ("//[::1/a", "again")])
def test_address_that_cannot_be_used(server, tmp_path, url, words):
    """A digest of another kind, and an address that is none, end in one line."""
    assert words in one_line(find_files, ("http:" if url.startswith("//") else server.url) + url, str(tmp_path))


def test_download_is_checked(server, tmp_path):
    """A file with another SHA-256 than that of the URL is not kept; with the right one it is."""
    assert "SHA-256" in one_line(find_files, f"{server.url}/a#sha256={'0' * 64}", str(tmp_path))
    assert not list(tmp_path.iterdir())
    digest = hashlib.sha256(CONTENT).hexdigest()
    path, = find_files(f"{server.url}/a#sha256={digest}", str(tmp_path))
    assert read(path) == CONTENT
    with open(path, "ab") as f:
        f.write(b"more")
    assert "SHA-256" in one_line(find_files, f"{server.url}/a#sha256={digest}", str(tmp_path))  # also of one that is there


@pytest.mark.parametrize("extra", [b"", b"of another file"])
def test_download_that_was_killed_at_its_end(server, tmp_path, extra):
    """A part that is whole gets its name; one that is longer than the file is thrown away, and the next run mends it."""
    path, = find_files(f"{server.url}/ä b.txt", str(tmp_path))                      # no letter is a reason to stop
    with open(path + ".part", "wb") as f:
        f.write(CONTENT + extra)
    os.remove(path)
    if extra:
        assert "again" in one_line(find_files, f"{server.url}/ä b.txt", str(tmp_path))
    assert read(find_files(f"{server.url}/ä b.txt", str(tmp_path))[0]) == CONTENT
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_page_is_named(server, tmp_path):
    """An address that is not there is one line, and leaves nothing."""
    assert "404" in one_line(find_files, f"{server.url}/missing", str(tmp_path)) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Demonstrations

USER, ASSISTANT = dict(role="user", content="Why?"), dict(role="assistant", content="Because.")


@pytest.mark.parametrize("record, fields, expected", [
    ({"prompt": "Why?", "response": "Because."}, "prompt,response", [USER, ASSISTANT]),
    ({"question": "Why?", "answer": "Because."}, "question,answer", [USER, ASSISTANT]),
    ({"instruction": "Why?", "output": "Because."}, "prompt,response", [USER, ASSISTANT]),
    ({"instruction": "Why?", "input": "", "output": "Because."}, "prompt,response", [USER, ASSISTANT]),
    ({"instruction": "Sum", "input": "1, 2", "output": "3"}, "prompt,response",
     [dict(role="user", content="Sum\n\n1, 2"), dict(role="assistant", content="3")]),
    ({"instruction": "Why?", "context": "", "response": "Because."}, "instruction,response", [USER, ASSISTANT]),
    ({"input": "Why?", "output": "Because."}, "input,output", [USER, ASSISTANT]),
    ({"context": "Why?", "answer": "Because.", "input": ["no", "text"]}, "context,answer", [USER, ASSISTANT]),
    ({"instruction": "Sum", "context": "1, 2", "response": "3"}, "instruction,response",
     [dict(role="user", content="Sum\n\n1, 2"), dict(role="assistant", content="3")]),
    ({"messages": [dict(role="system", content="Be brief."), USER, ASSISTANT, USER, ASSISTANT]}, "prompt,response",
     [dict(role="system", content="Be brief."), USER, ASSISTANT, USER, ASSISTANT])])
def test_demonstrations_of_all_forms(record, fields, expected):
    """Messages, pairs by the names of their fields, Alpaca's instructions with and without an input."""
    assert as_messages(record, fields) == expected
    ask = fields.split(",")[0]
    if ask in record:                                               # and what it asks is the same for --prompts
        assert prepare.as_prompt(record, ask) == expected[:-1]


@pytest.mark.parametrize("record", [
    {}, {"prompt": "Why?"}, {"prompt": "", "response": "Because."}, {"prompt": "Why?", "response": 3},
    {"messages": []}, {"messages": [USER]}, {"messages": [USER, dict(role="robot", content="Beep.")]},
    {"messages": "Why?"}, {"messages": [{}]}, {"instruction": None, "output": "x"}])
def test_no_demonstration(record):
    """What is none is refused by an error that read_as counts, never by another one."""
    with pytest.raises((KeyError, TypeError, AttributeError, IndexError, ValueError)):
        as_messages(record, "prompt,response")


def test_every_assistants_turn_is_trained_on(tmp_path):
    """Of several turns and a system's, exactly the assistant's words and the ends of its turns are trained on."""
    tokenizer = load_tokenizer(run_prepare(tmp_path / "out"))
    messages = [dict(role="system", content="Be brief."), USER, ASSISTANT, USER, dict(role="assistant", content="No.")]
    ids, trained = render(tokenizer, messages)
    said = tokenizer.encoding.decode([i for i, t in zip(ids, trained) if t])
    assert said == "Because.<|im_end|>No.<|im_end|>"
    assert prompt_ids(tokenizer, messages[:2]) == ids[:len(prompt_ids(tokenizer, messages[:2]))]


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons

HH = "\n\nHuman: Why?\n\nAssistant: {}\n\nHuman: Really?\n\nAssistant: {}"
HH_PROMPT = [USER, dict(role="assistant", content="So."), dict(role="user", content="Really?")]


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, ([USER], ["So.", "No."], [[0], [1]])),
    ({"instruction": "Why?", "input": "", "output": "x", "chosen": "So.", "rejected": "No."},
     ([USER], ["So.", "No."], [[0], [1]])),
    ({"chosen": HH.format("So.", "Yes."), "rejected": HH.format("So.", "No. Human: is fine")},
     (HH_PROMPT, ["Yes.", "No. Human: is fine"], [[0], [1]])),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, dict(role="assistant", content="No.")]},
     ([USER], ["Because.", "No."], [[0], [1]])),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "scores": [2, 5, 2]}, ([USER], ["a", "b", "c"], [[1], [0, 2]])),
    ({"prompt": [USER], "responses": [{"text": "a"}, {"text": "b"}], "ranking": [[1], [0]]},
     ([USER], ["a", "b"], [[1], [0]])),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [dict(content="No.", role="assistant", id=7)]},
     ([USER], ["Because.", "No."], [[0], [1]])),
    ({"prompt": "Why?", "chosen": [USER, ASSISTANT], "rejected": [USER, dict(role="assistant", content="No.")],
      "messages": [USER, ASSISTANT]}, ([USER], ["Because.", "No."], [[0], [1]])),
    ({"instruction": "Why?", "responses": ["a", "b"], "scores": ["9", "10"]}, ([USER], ["a", "b"], [[1], [0]])),
    ({"instruction": "Why?", "completions": [dict(response=r, overall_score=s, model="m") for r, s in (("a", 7.5), ("b", 9))]},
     ([USER], ["a", "b"], [[1], [0]])),
    ({"prompt": "Why?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]},
     ([USER], ["a", "b"], [[1], [0]]))])
def test_comparisons_of_all_forms(record, expected):
    """Chosen and rejected, with a prompt or as two transcripts; rated and ranked lists with ties."""
    assert as_comparison(record) == (*expected, 0)
    if "prompt" in record:  # by any other name
        assert as_comparison({{"prompt": "query"}.get(name, name): x for name, x in record.items()}, "query")[:3] == expected


@pytest.mark.parametrize("record, rule", [
    ({"prompt": "Why?", "chosen": "So.", "rejected": "So."}, "two equal replies"),
    ({"prompt": "Why?", "chosen": "So.", "rejected": " "}, "an empty reply"),
    ({"chosen": HH.format("So.", "Yes."), "rejected": HH.format("No.", "Yes!")}, "two different prompts"),
    ({"chosen": HH.format("So.", ""), "rejected": HH.format("So.", "Yes!")}, "an empty reply"),
    ({"chosen": HH.format("So.", "Yes.") + "\n\nHuman: Oh.", "rejected": HH.format("So.", "No.")}, "assistant's turn"),
    ({"chosen": [USER], "rejected": [USER]}, "assistant's turn"),
    ({"prompt": "Why?", "responses": ["a", "b"], "scores": [3, 3]}, "all replies are tied"),
    ({"prompt": "Why?", "responses": ["a", " ", "a"], "scores": [1, 2, 3]}, "an empty reply"),
    ({"prompt": "Why?", "responses": ["a", "b"], "ranking": [[0]]}, "each reply once")])
def test_unusable_comparisons_are_dropped_by_rule(record, rule):
    """Equal sides, different prompts and empty replies say nothing about preference: each has its rule."""
    with pytest.raises(ValueError, match=rule):
        as_comparison(record)


def test_longer_lists_lose_single_replies():
    """Of a longer list an empty reply, or one that repeats another, is left out alone, and counted; ranks move up."""
    record = dict(prompt="Why?", responses=["a", "", "b", "a", "c"], scores=[1, 9, 2, 3, 1])
    assert as_comparison(record) == ([USER], ["a", "b", "c"], [[1], [0, 2]], 2)


@pytest.mark.parametrize("option, record, words", [
    ("demonstrations", {"messages": [dict(USER, role="human"), ASSISTANT]}, "a role other than"),
    ("comparisons", {"prompt": "Why?", "chosen": "So.", "rejected": "So."}, "two equal replies"),
    ("comparisons", {"prompt": "Why?", "responses": ["a", "b"], "scores": [10**400, 1]}, "1 of 1 records")])
def test_nothing_usable_is_an_error(tmp_path, option, record, words):
    """If no record of an option's files can be used, that is said at once, not by a later stage."""
    (tmp_path / "a.txt").write_text("The fox is at home.\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    message = one_line(run_prepare, tmp_path / "out", f"--text={tmp_path}/a.txt", f"--{option}={tmp_path}/a.jsonl")
    assert words in message and "a.jsonl" in message


@pytest.mark.parametrize("record", [{}, {"chosen": "a"}, {"chosen": 1, "rejected": 2}, {"chosen": "", "rejected": ""},
                                    {"prompt": 3, "responses": ["a", "b"], "scores": [1, 2]},
                                    {"prompt": [{"content": "a"}], "chosen": "a", "rejected": "b"},
                                    {"responses": 3, "prompt": "a"}, {"responses": [], "scores": [], "prompt": "a"}])
def test_no_comparison(record):
    """What is none is refused by an error that read_as counts."""
    with pytest.raises((KeyError, TypeError, AttributeError, IndexError, ValueError)):
        as_comparison(record)


# ---------------------------------------------------------------------------------------------------------------------
# All of it

def test_what_was_trained_on_is_not_held_out(tmp_path):
    """No prompt that any turn of a demonstration answers is used again, in whatever order its keys stand; --prompts takes
    the name of its field from --fields."""
    (tmp_path / "book.txt").write_text("\n\n".join(f"The {a} and the {b} are at the mill." for a in "xyz" for b in "uvw"))
    (tmp_path / "sft.jsonl").write_text(json.dumps({"messages": [USER, ASSISTANT, dict(USER, content="So?"), ASSISTANT]}))
    asked = [[{"content": "Why?", "role": "user"}], [USER, ASSISTANT, dict(USER, content="So?")], "Where?", "When?"]
    (tmp_path / "ask.jsonl").write_text("\n".join(json.dumps({"question": q}) for q in asked))
    out = run_prepare(tmp_path / "out", f"--text={tmp_path}/book.txt", "--separator=", "--fields=question,answer",
                      f"--demonstrations={tmp_path}/sft.jsonl", f"--prompts={tmp_path}/ask.jsonl", "--val_share=0.3",
                      "--vocab_size=270", "--min_words=1")
    assert sorted(r["prompt"] for r in read_jsonl(str(out / "prompts.jsonl"))) == ["When?", "Where?"]
    counts = json.loads((out / "data.json").read_text())["problems"]
    assert counts == {"prompts left out that come twice or that a demonstration answers": 2}


def test_tail_of_several_documents(tmp_path):
    """With --val_tail the end of the text is held out: whole documents, and of one its end; nothing is lost."""
    texts = [f"{i} " + "the fox and the hen at the mill, " * 3 for i in range(20)]
    (tmp_path / "book.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    out = run_prepare(tmp_path / "out", f"--text={tmp_path}/book.jsonl", "--val_tail", "--val_share=0.33",
                      "--cleaning=false", "--vocab_size=270")
    tokenizer = load_tokenizer(out)
    train, val = (tokenizer.decode(load_tokens(out, side)[0].tolist()).split("<|endoftext|>")[:-1] for side in
                  ("train", "val"))
    assert train + val == texts[:13] + [train[13], val[0]] + texts[14:] and train[13] + val[0] == texts[13]
    assert sum(map(len, val)) == pytest.approx(0.33 * sum(map(len, texts)), abs=1) and not list(out.glob("*.tmp"))


def test_tokenizer_of_a_single_long_text(tmp_path):
    """The sample that the tokenizer is trained on is taken from all over a text, also if that is a single document."""
    words = np.random.default_rng(0).choice("the fox and the hen went to a mill with their basket".split(), 60_000)
    (tmp_path / "book.txt").write_text(" ".join(words))
    for seed in (1, 2):
        out = run_prepare(tmp_path / f"out{seed}", f"--text={tmp_path}/book.txt", "--val_tail", "--cleaning=false",
                          "--bpe_megabytes=0.05", f"--seed={seed}", "--vocab_size=280")
        assert load_tokenizer(out).size == 280


def test_own_files_end_to_end(tmp_path, capsys):
    """prepare.py on a book, demonstrations and transcripts: all files are there, no prompt stands in two of them, the
    comparisons left are those of the prompts for reward.py, and what was dropped is counted in data.json."""
    words = "the fox and the hen went to the mill with a basket and said that it was a fine day for all of them".split()
    rng = np.random.default_rng(0)
    (tmp_path / "book.txt").write_text("\n\n".join(" ".join(rng.choice(words, 30)) + "." for _ in range(400)))
    (tmp_path / "sft.json").write_text(json.dumps([{"question": f"Why {i}?", "answer": "So."} for i in range(30)]))
    lines = [json.dumps({side: HH.format(f"So {i // 2}.", said) for side, said in (("chosen", f"Yes {i}."),
                                                                                   ("rejected", "No."))})
             for i in range(80)]
    lines[7] = json.dumps({"chosen": HH.format("a", "b"), "rejected": HH.format("a", "b")})
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt") as f:
        f.write("\n".join(lines))
    out = run_prepare(tmp_path / "out", f"--text={tmp_path}/book.txt", "--separator=", "--fields=question,answer",
                      f"--demonstrations={tmp_path}/sft.json", f"--comparisons={tmp_path}/hh.jsonl.gz", "--n_eval=4",
                      "--vocab_size=300")
    demonstrations, prompts, held_out, compared = (read_jsonl(str(out / f"{n}.jsonl")) for n in (
        "sft", "prompts", "eval", "comparisons"))
    assert len(demonstrations) == 30 and len(prompts) == 36 and len(held_out) == 4
    by_use = {use: {p["id"] for p in prompts if p["use"] == use} for use in ("compare", "ppo")}
    assert len(by_use["compare"]) == 27 and len(by_use["ppo"]) == 9
    assert {c["id"] for c in compared} == by_use["compare"]
    assert not by_use["compare"] & by_use["ppo"] and not {h["id"] for h in held_out} & {p["id"] for p in prompts}
    tokenizer = load_tokenizer(out)
    for line in compared:
        assert line["ranking"] == [[0], [1]] and line["annotator"] == "people"
        for x in line["responses"]:
            assert x["tokens"][-1] == tokenizer.end and tokenizer.text(x["tokens"]) == x["text"]
    data = json.loads((out / "data.json").read_text())
    kept = "comparisons left out whose prompt is held out or for ppo.py"
    assert data["problems"] == {"two equal replies": 1, kept: 26} and data["documents_read"] == 400
    said = capsys.readouterr().out
    assert "hh.jsonl.gz, line 8: two equal replies" in said and f"{kept}: 26" in said
    assert not list(out.glob("*.tmp"))
