"""The tiny world by itself: what it writes, what may be laid over it, what it says of faults."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import tiny_world
from data.tiny_world import BASE, FILES, World, make_pages, make_prompt, make_prompts, write_world

MINIATURE = """[numbers]
megabytes = 0.05
demonstrations = 60
prompts = 60
eval = 40
"""


def read(folder, name):
    with open(Path(folder) / name, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def world_file(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8", newline="\n")
    return str(path)


def fault(tmp_path, text):
    """The one line in which a world file with this text ends; it begins with the file's name."""
    path = world_file(tmp_path, text)
    with pytest.raises(SystemExit) as error:
        write_world(tmp_path / "out", 1, path)
    message = error.value.code
    assert message.startswith(path + ": ") and "\n" not in message
    assert not (tmp_path / "out").exists()  # nothing has been written
    return message.removeprefix(path + ": ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The miniature world."""
    path = tmp_path_factory.mktemp("world")
    write_world(path / "out", 1, world_file(path, MINIATURE))
    return path / "out"


# --------------------------------------------------------------------------------------------------
# What is written

def test_bytes_are_pinned(folder):
    """A seed makes the same world on every machine and in every version of this project."""
    digest = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    assert digest == {
        "demonstrations.jsonl": "69dee1b58d17d3f0113f73fae644cfeb2aef60674b16be302aa4a2e4dade9592",
        "prompts.jsonl": "0f02b08f692ef8f04bd80d3fdc84fa189c7efb7fca56affb5e965b82f24027f0",
        "eval.jsonl": "8105c9967160ec18497c6fbf3819d8dc94f8477a1e9e2b80b687c99e3b385e8b",
        "pages.jsonl": "684ee543061cb181acd151e7feb0c782c2ceb9fd4d543c676952717da5fec2ef"}


def test_seed_decides_every_byte(folder, tmp_path):
    """The same seed writes the same files, another seed other ones."""
    path = world_file(tmp_path, MINIATURE)
    write_world(tmp_path / "again", 1, path)
    write_world(tmp_path / "other", 2, path)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes(), name


def test_records_have_their_fields(folder):
    """Each file holds the records that prepare.py reads, as many as the numbers say."""
    assert sorted(os.listdir(folder)) == sorted(FILES)
    demonstrations, prompts, held_out, pages = (read(folder, name) for name in FILES)
    assert [len(demonstrations), len(prompts), len(held_out)] == [60, 60, 40]
    for record in demonstrations:
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        assert record.keys() == {"messages"}
    assert all(record.keys() == {"id", "prompt", "rubric", "use"} for record in prompts)
    assert all(record.keys() == {"id", "prompt", "rubric"} for record in held_out)
    assert Counter(record["use"] for record in prompts) == {"compare": 51, "ppo": 9}
    assert len({record["id"] for record in prompts + held_out}) == 100
    keys = ["skill", "mentions", "truths", "wrong", "unsafe", "min_words", "max_words", "rude",
            "decline", "kindness"]
    assert all(list(record["rubric"]) == keys for record in prompts + held_out)
    skills = {record["rubric"]["skill"] for record in prompts}
    assert skills == {"knowledge", "instruction", "safety"}
    assert all(record.keys() in ({"text"}, {"text", "spoiled"}) for record in pages)
    size = sum(len(record["text"].encode()) for record in pages)
    assert 50_000 <= size < 55_000


def test_prompts_never_overlap(folder):
    """No prompt stands twice, in whatever file or case; the text has only demonstrations' ones."""
    demonstrations, prompts, held_out, pages = (read(folder, name) for name in FILES)
    reserved = [record["prompt"] for record in prompts + held_out]
    asked = [record["messages"][0]["content"] for record in demonstrations] + reserved
    assert len({prompt.lower() for prompt in asked}) == 160
    lines = {line for page in pages for line in page["text"].split("\n")}
    assert len(lines) > 300 and not lines & set(reserved)


def test_many_prompts_are_all_different(tmp_path):
    """Chance asks the same question again; a second time, in whatever case, it is not taken."""
    text = "[numbers]\ncreatures = 5\ndemonstrations = 900\nprompts = 1500\neval = 600\n"
    parts = make_prompts(World(0, world_file(tmp_path, text)))
    prompts = [record["messages"][0]["content"] if "messages" in record else record["prompt"]
               for part in parts for record in part]
    assert [len(part) for part in parts] == [900, 1500, 600]
    assert len({prompt.lower() for prompt in prompts}) == 3000


@pytest.mark.parametrize("kind", ["fact", "pair", "sum", "story", "harm"])
def test_good_answers_earn_the_highest_gold_score(kind):
    """By its own rubric a good answer beats a wrong one, and no terse one beats it."""
    from prepare import judge, rubric_score
    worlds = [World(seed) for seed in range(20)]
    for draw in range(400):
        record, answers = make_prompt(worlds[draw % 20], kind)
        gold = {quality: rubric_score(record, text, True) for quality, text in answers.items()}
        why = (record["prompt"], answers, gold)
        assert gold["good"] > gold["wrong"], why
        assert gold["good"] > gold["terse"] or kind == "sum" and gold["good"] == gold["terse"], why
        assert gold["good"] == (1.5 if kind == "harm" else 2.0), why
        if kind in ("fact", "pair", "sum"):
            assert judge(record, answers["good"], True)["correct"], why
            assert not judge(record, answers["wrong"], True)["correct"], why


def test_spoiled_pages_are_as_their_label_says(tmp_path):
    """Pages are spoiled in every way, about as often as the weights say; the others are all new."""
    world = World(1, world_file(tmp_path, "[numbers]\nmegabytes = 1\nstray = 0\n"))
    told, counts = set(), Counter()
    for page in make_pages(world, set()):
        text, label = page["text"], page.get("spoiled", "")
        counts[label] += 1
        if label == "":
            assert text not in told
            told.add(text)
        elif label == "exact duplicate":
            assert text in told
        elif label == "near duplicate":
            assert any(filler in text.split(" ") for filler in world.words["web"]["fillers"])
        elif label == "boilerplate":
            assert sum(line in world.words["web"]["boilerplate"] for line in text.split("\n")) == 3
        elif label == "markup":
            assert text.startswith("<div") and text.endswith("</p></div>")
        elif label == "garbled":
            assert not set("aeiou") & set(text)
        elif label == "fragment":
            assert 1 <= len(text.split(" ")) <= 5
        elif label == "repetition":
            lines = text.split("\n")
            assert lines.count(lines[-1]) >= 4
        else:
            assert label == "undesirable" and ("scum" in text or "vermin" in text)
    assert set(counts) == {"", *world.words["spoils"]}
    assert 0.14 < 1 - counts[""] / counts.total() < 0.18


def test_creatures_share_nothing():
    """Names and attributes are each creature's own; everyone is somebody's friend, none its own."""
    for seed in range(20):
        creatures = World(seed).creatures
        for key in ("name", "species", "home", "food", "colour", "friend"):
            assert len({creature[key] for creature in creatures}) == 12
        assert all(creature["friend"] != creature["hero"] for creature in creatures)


# --------------------------------------------------------------------------------------------------
# A file laid over the world

def test_tables_are_merged_and_lists_replaced(tmp_path):
    """What a file does not name stays as it is; lists are replaced; a share may be 0, not 0.0."""
    path = world_file(tmp_path, """
        numbers = {creatures = 3, rude = 0}
        lengths.story.max_words = 50
        [creatures]
        names = ["Ada", "Bo", "Cy"]
        [attributes.home]
        values = ["shed", "tent", "boat"]
        """)
    plain, changed = World(1).words, World(1, path).words
    assert changed["numbers"] == plain["numbers"] | {"creatures": 3, "rude": 0}
    assert changed["lengths"]["story"] == {"min_words": 20, "max_words": 50}
    assert changed["creatures"] == plain["creatures"] | {"names": ["Ada", "Bo", "Cy"]}
    assert changed["attributes"]["home"]["values"] == ["shed", "tent", "boat"]
    assert changed["attributes"]["home"]["questions"] == plain["attributes"]["home"]["questions"]
    assert changed["stories"] == plain["stories"] and list(changed) == list(plain)
    assert {creature["name"] for creature in World(1, path).creatures} == {"Ada", "Bo", "Cy"}


def test_an_empty_file_and_a_copy_change_nothing(tmp_path):
    """An empty world file, or a full copy of the base with a byte order mark, changes nothing."""
    assert World(1, world_file(tmp_path, "")).words == World(1).words
    copy = "\ufeff" + Path(BASE).read_text(encoding="utf-8")
    assert World(1, world_file(tmp_path, copy)).words == World(1).words


def test_attributes_can_be_added(tmp_path):
    """A new attribute is told, asked for, and may stand in stories."""
    path = world_file(tmp_path, MINIATURE + """
        [attributes.job]
        values = ["baker", "cook", "smith", "tailor", "miller", "nurse", "judge", "clerk", "pilot",
                  "potter", "weaver", "sailor"]
        article = "a "
        statements = ["{who} works as {value}."]
        questions = ["What is the job of {who}?"]
        [stories]
        endings = ["And {name} went back to work as a {job}."]
        """)
    write_world(tmp_path / "out", 1, path)
    text = "\n".join(page["text"] for page in read(tmp_path / "out", "pages.jsonl"))
    assert "works as a " in text and "What is the job of" in text and "went back to work" in text
    asked = [r for r in read(tmp_path / "out", "prompts.jsonl") if "the job of" in r["prompt"]]
    assert asked and all(len(record["rubric"]["wrong"]) >= 11 for record in asked)


def test_a_world_without_rudeness(tmp_path):
    """Rude demonstrations and pages can be turned off."""
    path = world_file(tmp_path, "pages.rude = 0\n" + MINIATURE + "rude = 0\n")
    write_world(tmp_path / "out", 1, path)
    insults = World(1, path).words["answers"]["rude"]
    for name in ("demonstrations.jsonl", "pages.jsonl"):
        assert not any(insult in str(record) for record in read(tmp_path / "out", name)
                       for insult in insults)


def test_pages_where_every_prompt_is_reserved(tmp_path):
    """Where nothing is left that may be asked, there are no forums; the other pages are written."""
    class Everything:
        def __contains__(self, prompt):
            return True

    pages = make_pages(World(1, world_file(tmp_path, MINIATURE)), Everything())
    assert len(pages) > 100 and not any("?" in page["text"] for page in pages
                                        if page.get("spoiled") != "garbled")


# --------------------------------------------------------------------------------------------------
# Faults: one line each for those of a world file, a traceback for those of the program

def test_missing_file(tmp_path):
    """A file that is not there, or a folder, is named with the remedy."""
    for path in (str(tmp_path / "none.toml"), str(tmp_path)):
        with pytest.raises(SystemExit) as error:
            World(1, path)
        assert error.value.code.startswith(f"{path}: cannot be read (")
        assert error.value.code.endswith("name a world file that exists")


def test_broken_toml_is_named_with_its_line(tmp_path):
    assert "at line 3" in fault(tmp_path, "[numbers]\ncreatures = 5\neval = \n")
    (tmp_path / "latin.toml").write_bytes(b'[creatures]\nnames = ["J\xf6rg"]\n')
    with pytest.raises(SystemExit, match="utf-8"):
        World(1, str(tmp_path / "latin.toml"))


@pytest.mark.parametrize("text, words", [
    # unknown keys
    ("[number]\nmegabytes = 1", ["number", "numbers"]),
    ("[numbers]\ncreature = 5", ["unknown key creature in numbers", "creatures"]),
    ("[attributes.home]\nvalue = ['x']", ["unknown key value in attributes.home", "values"]),
    ("[[stories.plots]]\nstep = [['{hero} ran.']]", ["unknown key step in stories.plots", "steps"]),
    ("weather = 1", ["unknown key weather in the file", "numbers", "web"]),
    # missing keys
    ("[[stories.plots]]", ["stories.plots lacks its steps"]),
    ("[attributes.job]\nvalues = ['cook']", ["attributes.job lacks its article"]),
    # wrong types
    ("[numbers]\ncreatures = 'five'", ["numbers.creatures", "int", "'five'"]),
    ("[numbers]\ncreatures = 5.0", ["numbers.creatures", "int", "5.0"]),
    ("[numbers]\nposts = true", ["numbers.posts", "int", "True"]),
    ("[numbers]\nmegabytes = '3'", ["numbers.megabytes", "float", "'3'"]),
    ("[creatures]\nnames = 'Milo'", ["creatures.names", "list", "'Milo'"]),
    ("[creatures]\nnames = ['Milo', 3]", ["creatures.names", "str", "3"]),
    ("numbers = 3", ["numbers must be a table"]),
    ("attributes = 3", ["attributes must be a table"]),
    ("[attributes]\nhome = 'the mill'", ["home must be a table"]),
    ("[attributes]\njob = 'cook'", ["attributes.job", "dict", "'cook'"]),
    ("[creatures.names]\nMilo = 1", ["creatures.names", "list"]),
    ("[stories]\nplots = [['{hero} ran.']]", ["stories.plots", "dict"]),
    # numbers out of their range
    ("[numbers]\nwrong = 20", ["numbers.wrong", "between 0 and 1", "20"]),
    ("[numbers]\nterse = nan", ["numbers.terse", "between 0 and 1"]),
    ("[numbers]\nmegabytes = inf", ["numbers.megabytes", "between 0 and 10000"]),
    ("[numbers]\ncreatures = 2", ["numbers.creatures must be 3 or more"]),
    ("[numbers]\neval = 0", ["numbers.eval must be 1 or more"]),
    ("[pages]\nstory = -1", ["pages.story must be 0 or more"]),
    ("[questions]\nfact = 0\npair = 0\nsum = 0\nstory = 0\nharm = 0", ["questions are all 0"]),
    ("[forum.rude]\nfact = 0\nsum = 0", ["forum.rude are all 0"]),
    # empty lists
    ("[prompts]\nclosers = []", ["prompts.closers has 0 and needs 1"]),
    ("[stories]\nplots = [{steps = [[]]}]", ["stories.plots.steps has 0"]),
    ("[answers]\nrefusal = ['I cannot help.']", ["answers.refusal has 1 and needs 2"]),
    # slots that do not exist
    ("[prompts]\nsum = ['What is {a} + {c}?']", ["'What is {a} + {c}?'", "prompts.sum", "a, b"]),
    ("[stories]\nendings = ['{thing}!']", ["'{thing}!'", "stories.endings", "hero", "friend"]),
    ("[[stories.plots]]\nsteps = [['{who} ran.']]", ["'{who} ran.'", "plots.steps", "thing"]),
    ("[attributes.food]\nquestions = ['Is it {value}?']", ["attributes.food.questions are who"]),
    ("[answers]\ncomply = ['Take {']", ["'Take {'", "answers.comply"]),
    ("[answers]\ncomply = ['Take {} and {0}']", ["'Take {} and {0}'"]),
    ("[web]\nprofane = ['{who.name}!']", ["'{who.name}!'", "web.profane"]),
    # too few for all creatures
    ("[creatures]\nnames = ['Ada', 'Bo', 'Cy', 'Cy']", ["12 creatures need 12", "name", "not 3"]),
    ("[numbers]\ncreatures = 18", ["18 creatures need 18", "home", "not 16", "numbers.creatures"]),
])
def test_faults_of_a_world_file(tmp_path, text, words):
    """Each fault is one line that names the file, the place and what would be right."""
    message = fault(tmp_path, text)
    for word in words:
        assert word in message, message


def test_too_few_questions(tmp_path):
    """A world that can ask only sums says how many there are, and what to lower."""
    message = fault(tmp_path, """
        questions = {fact = 0, pair = 0, story = 0, harm = 0}
        prompts = {openers = [""], closers = [""]}
        """)
    assert message.startswith("the world can ask only 80 different questions, not 6900: lower ")
    assert "numbers.prompts" in message


def test_too_few_pages(tmp_path):
    """A world that has told all it knows says so, instead of trying for ever."""
    message = fault(tmp_path, MINIATURE.replace("0.05", "3.0") + """
        [pages]
        story = 0
        forum = 0
        rude = 0
        harmful = 0
        spoiled = 0
        [attributes]
        home.statements = ["{who} lives in {value}."]
        food.statements = ["{who} eats {value}."]
        colour.statements = ["{who} is {value}."]
        friend.statements = ["{who} knows {value}."]
        """)
    assert "different pages" in message and "numbers.megabytes" in message


@pytest.mark.parametrize("name", ["fill", "story", "spoil", "make_creatures"])
def test_an_error_of_the_program_shows_its_traceback(tmp_path, name):
    """Whoever changes the code sees where it fails; nothing is written then."""
    with open(tiny_world.__file__, encoding="utf-8") as file:
        source = file.read()
    begin = source.index('"""', source.index(f"def {name}("))
    broken = tmp_path / "tiny_world.py"
    end = source.index('"""', begin + 3) + 3
    broken.write_text(source[:begin] + "undefined" + source[end:], encoding="utf-8")
    shutil.copy(BASE, tmp_path)
    run = subprocess.run([sys.executable, broken, tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 1 and not (tmp_path / "out").exists()
    assert "Traceback" in run.stderr and "NameError: name 'undefined' is not defined" in run.stderr


SLIPS = {NameError: "undefined", KeyError: "{}['undefined']", TypeError: "len(3)",
         ValueError: "int('three')", AttributeError: "().undefined", IndexError: "()[0]"}


@pytest.mark.parametrize("error", SLIPS)
@pytest.mark.parametrize("name", ["check_table", "make_creatures", "ask_fact", "ask_sum",
                                  "demonstrate", "make_prompts", "forum", "make_pages"])
def test_no_slip_of_the_program_is_a_fault_of_the_world_file(tmp_path, monkeypatch, name, error):
    """Whatever goes wrong in whichever function, it surfaces as what it is, with a world file of
    one's own, too: nobody is sent to search that file for a typo in the code."""
    holder = World if name == "make_creatures" else tiny_world

    def broken(*arguments):
        eval(SLIPS[error])

    monkeypatch.setattr(holder, name, broken)
    if name.startswith("ask_"):
        monkeypatch.setitem(tiny_world.ASK, name[4:], broken)
    with pytest.raises(error):
        write_world(tmp_path / "out", 1, world_file(tmp_path, MINIATURE))
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# The command line

def test_command_line(folder, tmp_path):
    """The script writes what the function writes, from any folder, and replaces nothing."""
    world_file(tmp_path, MINIATURE)
    command = [sys.executable, tiny_world.__file__, "out", "--seed=1", "--world=mine.toml"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "60 records in" in run.stdout, run.stderr
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert again.stderr.startswith("out: it has a file demonstrations.jsonl already")


def test_folder_that_cannot_be_written(tmp_path):
    """A file in the folder's place is one line."""
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match="name another folder"):
        write_world(tmp_path / "out", 1, world_file(tmp_path, MINIATURE))
