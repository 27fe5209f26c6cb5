"""Whatever comes in: any text, any ranking, any option ends in a result or in one line, never in a
traceback. Other forms of people's files are in test_fuzz_convert.py."""

import gzip
import json
import os
import tempfile

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from model import load_config
from ppo import PPOConfig
from prepare import (SPECIAL, PrepareConfig, Tokenizer, prompt_ids, read_documents, read_rankings,
                     render, repair, train_bpe)
from pretrain import PretrainConfig
from reward import make_batch

settings.register_profile("suite", max_examples=100, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

TOKENIZER = Tokenizer(train_bpe(["the fox and the hen went to the mill, the mill was old"], 300))
PIECES = [*SPECIAL, "a", "\n", "<|", "|>", "é", "\u200b", "\r", "e\u0301"]
TEXT = (st.text(st.characters(exclude_categories=["Cs"]))
        | st.lists(st.sampled_from(PIECES)).map("".join))
NUMBERS = st.integers() | st.floats(allow_subnormal=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["text", "tokens", "role", "content"]), inner, max_size=3),
    max_leaves=8)


@given(TEXT)
def test_every_text_comes_back(text):
    """decode(encode(s)) = s for every text, and no text becomes a control token."""
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert max(ids, default=0) < TOKENIZER.end_of_text


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=5),
       st.booleans())
def test_no_conversation_forges_a_turn(turns, reply):
    """However the words look, a conversation has the control tokens of its turns and no others;
    what is trained on is what the assistant says and the end of its turns."""
    messages = [dict(role=role, content=content) for role, content in turns]
    ids, trained = render(TOKENIZER, messages, reply)
    assert ids.count(TOKENIZER.start) == len(turns) + reply
    assert ids.count(TOKENIZER.end) == len(turns)
    assert TOKENIZER.end_of_text not in ids and len(ids) == len(trained)
    said = TOKENIZER.encoding.decode_bytes([i for i, t in zip(ids, trained) if t])
    assert said.decode() == "".join(f"{c}<|im_end|>" for role, c in turns if role == "assistant")


@given(TEXT)
def test_repair_is_idempotent(text):
    """What has been repaired is left alone."""
    assert repair(repair(text)) == repair(text)


def with_file(name, content, use):
    """What `use` makes of a file's path, or the one line in which it ends, which names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        with open(path, "wb") as f:
            f.write(content)
        try:
            return use(path)
        except SystemExit as error:
            assert path in error.code and "\n" not in error.code
            return error.code


def read(path):
    found = [text for text, _ in read_documents([path])]
    assert all(isinstance(text, str) and text for text in found)
    return found


@given(st.binary(max_size=300), st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.gz"]))
def test_any_bytes_can_be_read(content, kind):
    """A file of any bytes is read, or refused in one line that names it."""
    with_file("a" + kind, gzip.compress(content) if kind.endswith(".gz") else content, read)


@given(st.binary(max_size=30), st.integers(0, 60))
def test_damaged_packed_files_are_named(content, size):
    """So is one that is called packed and is not, or that was cut off."""
    packed = gzip.compress(content * 5)
    for damaged in (content, packed[:size % len(packed)]):
        assert isinstance(with_file("a.txt.gz", damaged, read), str) or not damaged


@given(st.dictionaries(st.sampled_from(["text", "spoiled"]), JSON) | JSON)
def test_any_record_of_text(record):
    """A line of JSON is a document, or refused in one line."""
    with_file("a.jsonl", json.dumps(record).encode(), read)


RESPONSE = st.fixed_dictionaries(
    dict(text=st.sampled_from(["", "the fox", "the hen"]) | JSON),
    optional=dict(tokens=st.lists(st.integers(-2, 310), max_size=3) | JSON,
                  ended=st.booleans() | JSON))
RANKING = (st.permutations([[0], [1], [2]]) | st.permutations([[0], [1]]) | st.just([[], []])
           | st.lists(st.lists(st.integers(-1, 3), max_size=3), max_size=3))
MESSAGES = st.lists(st.fixed_dictionaries(dict(role=st.just("user") | JSON, content=TEXT | JSON)),
                    max_size=2)
ANY = dict(id=st.text(max_size=3), prompt=TEXT | MESSAGES, annotator=st.text(max_size=3),
           responses=st.lists(RESPONSE, max_size=3), ranking=RANKING)
RECORD = st.fixed_dictionaries(
    {name: value | JSON for name, value in ANY.items()}) | st.fixed_dictionaries({}, optional=ANY)


@given(RECORD)
@example(dict(id="a", prompt="", responses=[dict(text="a"), dict(text="b")], ranking=[[], []],
              annotator="people"))
def test_any_ranking_is_usable_or_left_out(record):
    """A line of a rankings file is left out, or reward.py can make a batch of it."""
    def use(path):
        for ranking in read_rankings([path], TOKENIZER):
            assert all(type(i) is int for group in ranking["ranking"] for i in group)
            if len(ranking["ranking"]) > 1:
                *_, ends, ranks = make_batch([ranking], TOKENIZER, "cpu")
                assert (ranks >= 0).sum() == len(ranking["responses"]) <= ends.shape[1]
            assert prompt_ids(TOKENIZER, ranking["prompt"])
        return "read"

    assert with_file("a.jsonl", json.dumps(record).encode(), use) == "read"


def test_a_bad_ranking_is_named(capsys):
    """What is left out is named by its line, with the reason; what is good beside it is read."""
    def ranking(**more):
        responses = [dict(text="the fox"), dict(text="the hen") | more.pop("response", {})]
        return dict(id="a", prompt="Who?", responses=responses, ranking=[[0], [1]],
                    annotator="people") | more

    fox = TOKENIZER.encode("the fox")
    lines = [ranking(), ranking(response=dict(tokens=fox)), ranking(response=dict(tokens=[999])),
             ranking(ranking=[[0]]), ranking(ranking=[[0], [0]]), ranking(ranking=[[0], [1], [2]]),
             ranking(annotator=""), dict(prompt="Who?"), ranking(ranking=[])]
    content = "\n".join(map(json.dumps, lines)) + "\nno JSON\n"
    found = with_file("a.jsonl", content.encode(), lambda path: read_rankings([path], TOKENIZER))
    assert [r["ranking"] for r in found] == [[[0], [1]], []]
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split("line ")[1] for line in told] == list("2345678") + ["10"]
    assert "tokenizer" in told[0] and "each response once" in told[2]


@given(st.permutations(range(3)), st.integers(0, 2), TEXT, st.booleans())
def test_a_good_ranking_is_usable(order, ties, prompt, with_tokens):
    """A ranking of the right form is not left out, with ties, and with tokens or without."""
    responses = [dict(text=text) for text in ("the fox", "the hen", "")]
    if with_tokens:
        for response in responses:
            ids = TOKENIZER.encode(response["text"]) + [TOKENIZER.end]
            response.update(tokens=ids, ended=True)
    groups = [order[:ties + 1], *([i] for i in order[ties + 1:])]
    record = dict(id="a", prompt=prompt, responses=responses, ranking=groups, annotator="people")
    found = with_file("a.jsonl", json.dumps(record).encode(),
                      lambda path: read_rankings([path], TOKENIZER))
    assert len(found) == 1 and found[0]["ranking"] == groups
    assert [r["tokens"][-1] for r in found[0]["responses"]] == [TOKENIZER.end] * 3


OPTIONS = ["seed", "max_steps", "learning_rate", "recompute", "cleaning", "n_head", "device",
           "text"]
LIKELY = st.builds("--{}={}".format, st.sampled_from(OPTIONS),
                   st.sampled_from(["1", "2.0", "true", "nan", "auto"]) | NUMBERS.map(str))
UNLIKELY = st.builds("--{}={}".format, st.sampled_from([*OPTIONS, "resume", "x"]),
                     st.text(max_size=6))


@given(st.sampled_from([PretrainConfig, PPOConfig, PrepareConfig]),
       st.lists(LIKELY, max_size=2) | st.lists(st.text(max_size=12) | UNLIKELY, max_size=2))
def test_any_option(cls, arguments):
    """Any command line is a configuration, with values of the right types, or one line that says
    what is wrong."""
    try:
        config = load_config(cls, "", arguments)
    except SystemExit as error:
        lines = sum(argument.count("\n") for argument in arguments)
        assert error.code == 0 or isinstance(error.code, str) and error.code.count("\n") <= lines
    else:
        for name in cls.__dataclass_fields__:
            assert type(getattr(config, name)) is cls.__dataclass_fields__[name].type


TOML = st.dictionaries(st.sampled_from(["seed", "out_dir", "ppo", "model", "lr"]),
                       st.integers() | st.booleans() | st.text(max_size=5), max_size=3)


@given(st.text(max_size=60)
       | TOML.map(lambda d: "\n".join(f"{k} = {json.dumps(v)}" for k, v in d.items())))
def test_any_config_file(text):
    """So is any config file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "c.toml")
        with open(path, "w", encoding="utf-8", errors="replace") as f:
            f.write(text)
        try:
            assert isinstance(load_config(PPOConfig, "", [f"--config={path}"]), PPOConfig)
        except SystemExit as error:
            assert "c.toml" in error.code
