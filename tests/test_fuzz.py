"""Whatever comes in: any text, any bytes, any option ends in a result or in one line, never in a traceback."""

import json
import os
import tempfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import load_config
from ppo import PPOConfig
from prepare import (SPECIAL, HTMLText, PrepareConfig, Problems, Tokenizer, as_comparison, as_messages, read_documents,
                     read_records, render, repair, train_bpe)
from pretrain import PretrainConfig
from reward import fault, parse_ranking

settings.register_profile("suite", max_examples=150, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("suite")

TOKENIZER = Tokenizer(train_bpe(["the fox and the hen went to the mill, and the mill was old"] * 3, 300))
PIECES = [*SPECIAL, "a", "\n", "<|", "|>", "é"]
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(PIECES)).map("".join)
NUMBERS = st.integers() | st.floats(allow_subnormal=False)
NAMES = ["text", "messages", "role", "content", "prompt", "response", "chosen", "rejected", "responses", "scores", "ranking",
         "id", "annotator", "tokens", "instruction", "input", "output"]
JSON = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(max_size=8), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5), max_leaves=12)
OPTIONS = ["seed", "max_steps", "learning_rate", "resume", "n_head", "device", "dtype", "x"]
TOML = st.dictionaries(st.sampled_from(["seed", "out_dir", "ppo", "model", "lr"]), st.integers() | st.booleans() |
                       st.text(max_size=5), max_size=3)


@given(TEXT)
def test_every_text_comes_back(text):
    """decode(encode(s)) = s for every text, no text becomes a control token, and the array holds the same ids."""
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and TOKENIZER.array(text).tolist() == ids
    assert max(ids, default=0) < TOKENIZER.end_of_text


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=5), st.booleans())
def test_no_conversation_forges_a_turn(turns, reply):
    """However the words look, a conversation has the control tokens of its turns and no others; what is trained on is
    what the assistant says and the end of its turns."""
    ids, trained = render(TOKENIZER, [dict(role=role, content=content) for role, content in turns], reply)
    assert ids.count(TOKENIZER.start) == len(turns) + reply and ids.count(TOKENIZER.end) == len(turns)
    assert TOKENIZER.end_of_text not in ids and len(ids) == len(trained)
    said = b"".join(TOKENIZER.encoding.decode_single_token_bytes(i) for i, t in zip(ids, trained) if t)
    assert said.decode() == "".join(f"{c}<|im_end|>" for role, c in turns if role == "assistant")


@given(TEXT)
def test_repair_is_idempotent(text):
    """What has been repaired is left alone."""
    assert repair(repair(text)) == repair(text)


@given(st.binary(max_size=300), st.sampled_from([".txt", ".jsonl", ".json", ".html", ".txt.gz"]))
def test_any_bytes_can_be_read(data, kind):
    """A file of any bytes is read, or refused in one line that names it."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a" + kind)
        with open(path, "wb") as f:
            f.write(data)
        try:
            assert all(isinstance(text, str) for text, _ in read_documents([path], PrepareConfig(), Problems()))
        except SystemExit as error:
            assert path in error.code and "\n" not in error.code


@given(st.lists(JSON.map(json.dumps) | st.text(max_size=20), max_size=5))
def test_any_record_is_converted_or_counted(lines):
    """Whatever a line of JSON holds, it is a demonstration or a comparison, or one of the errors that are counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.jsonl")
        with open(path, "w", encoding="utf-8", errors="replace") as f:
            f.write("\n".join(lines))
        for _, record in read_records(path, Problems()):
            for convert in (lambda r: as_messages(r, "prompt,response"), as_comparison):
                try:
                    convert(record)
                except (KeyError, TypeError, AttributeError, IndexError, ValueError):
                    pass


@given(JSON.map(json.dumps) | st.text(max_size=30))
def test_any_ranking_is_usable_or_faulty(line):
    """A line of a rankings file is described as faulty, or can be used."""
    assert isinstance(fault(line, TOKENIZER), str)


@given(st.text(st.sampled_from("0123=>, a²"), max_size=12), st.integers(1, 5))
def test_any_typed_ranking(text, n):
    """What a person types is an order of all responses, or says what is wrong."""
    try:
        assert sorted(i for group in parse_ranking(text, n) for i in group) == list(range(n))
    except ValueError as error:
        assert "name each of" in str(error)


@given(st.sampled_from([PretrainConfig, PPOConfig, PrepareConfig]), st.lists(st.text(max_size=12) | st.builds(
    "--{}={}".format, st.sampled_from(OPTIONS), st.text(max_size=6) | NUMBERS.map(str)), max_size=3))
def test_any_option(cls, arguments):
    """Any command line is a configuration, or one line that says what is wrong."""
    try:
        assert isinstance(load_config(cls, "", arguments), cls)
    except SystemExit as error:
        assert error.code == 0 or isinstance(error.code, str) and "\n" not in error.code.replace(str(arguments), "")


@given(st.text(max_size=60) | TOML.map(lambda d: "\n".join(f"{k} = {json.dumps(v)}" for k, v in d.items())))
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


@given(TEXT)
def test_any_page(text):
    """HTML is reduced to text whatever it looks like."""
    assert isinstance(HTMLText(f"<p>{text}</p><{text}><b>{text}").text, str)
