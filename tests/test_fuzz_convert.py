"""Whatever people's files hold, data/convert.py makes plain records of it, or says in one line why
it does not."""

import json
import os
import tempfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.convert import FORMS, HTMLText, main

QUICK = settings(max_examples=100, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.too_slow])
NUMBERS = st.integers() | st.floats(allow_subnormal=False)
ROLES = st.sampled_from(["user", "human", "assistant", "gpt", "system", "tool"])
NAMES = sorted({need.lower() for forms in FORMS.values() for form in forms
                for need in (*form.needs.split(), *form.also)}
               | {"prompt", "response", "helpfulness", "role", "from", "content", "value", "score"})
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | ROLES,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5), max_leaves=12)
TURNS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=5) | JSON}),
                 max_size=4)
FIELDS = st.sampled_from([form.needs.split() for forms in FORMS.values() for form in forms])


@st.composite
def records(draw):
    """A record that looks as if it were in a known form."""
    names = [{"ASK": "prompt", "ANSWER": "response", "RATING": "helpfulness", "TEXT": "text"}
             .get(need, need) for need in draw(FIELDS)]
    return {name: draw(st.text(max_size=5) | TURNS | JSON) for name in names} | draw(
        st.dictionaries(st.sampled_from(NAMES), JSON, max_size=2))


def check(data, name, task):
    """The command on a file of these bytes: well-formed records, or one line and no file."""
    with tempfile.TemporaryDirectory() as folder:
        path, to = os.path.join(folder, name), os.path.join(folder, "new.jsonl")
        with open(path, "wb") as f:
            f.write(data)
        try:
            main([path, f"--as={task}", f"--to={to}"])
        except SystemExit as error:
            assert path in error.code and "\n" not in error.code
            assert os.listdir(folder) == [name]
        else:
            with open(to, encoding="utf-8") as f:
                made = [json.loads(line) for line in f]
            assert made
            for record in made:
                well_formed(record, task)


def well_formed(record, task):
    if task == "text":
        assert isinstance(record["text"], str) and record["text"].strip()
        return
    prompt = record["messages"][:-1] if task == "demonstrations" else record["prompt"]
    if task == "demonstrations":
        assert record["messages"][-1]["role"] == "assistant"
        assert any(turn["role"] == "user" for turn in prompt)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    assert turns and all(turn["role"] in ("system", "user", "assistant") for turn in turns)
    assert all(turn["content"].strip() for turn in turns)
    if task == "comparisons":
        named = sorted(i for group in record["ranking"] for i in group)
        assert named == list(range(len(record["responses"]))) and len(record["ranking"]) > 1
        assert all(reply["text"].strip() for reply in record["responses"])


@QUICK
@given(st.binary(max_size=300), st.sampled_from(
    [".txt", ".jsonl", ".json", ".html", ".txt.gz", ".csv", ""]),
    st.sampled_from(list(FORMS)))
def test_any_bytes(data, kind, task):
    check(data, "a" + kind, task)


@QUICK
@given(st.lists((records() | JSON).map(json.dumps) | st.text(max_size=20), max_size=4),
       st.sampled_from(list(FORMS)), st.booleans())
def test_any_record(lines, task, as_list):
    text = "[" + ", ".join(lines) + "]" if as_list else "\n".join(lines)
    check(text.encode("utf-8", "replace"), "a.json" if as_list else "a.jsonl", task)


@QUICK
@given(records(), st.sampled_from(["demonstrations", "comparisons", "prompts"]))
def test_any_record_of_a_known_form(record, task):
    check(json.dumps(record).encode(), "a.jsonl", task)


@QUICK
@given(st.text())
def test_any_page(text):
    assert isinstance(HTMLText(f"<p>{text}</p><{text}><b>{text}").text, str)
