"""Models out to Hugging Face's folders and to GGUF, and Qwen3 folders in: held against transformers
and llama.cpp themselves. Where these are not installed their tests are skipped."""

import hashlib
import importlib.util
import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from chain import OPTIONS, copy, fail, one_line, prepare_options, read_json, succeed
from helpers import close, one_process, tiny
from model import LanguageModel, ScalarModel, generate, load_checkpoint, restore
from prepare import (PATTERN, SPECIAL, PrepareConfig, Tokenizer, as_messages, load_tokenizer,
                     prompt_ids, read_jsonl, render, train_bpe)
from tools import huggingface

V = 512  # tokens of the miniature world
TIED = dict(vocab_size=V, block_size=128, rope_theta=10000.0)
UNTIED = TIED | dict(tie_embeddings=False, head_dim=12, n_kv_head=1, rope_theta=500.0)
SHAPES = [pytest.param(TIED, id="tied"), pytest.param(UNTIED, id="untied")]
TRICKY = ["", " ", "\n", " \n\n \n", "a\r\n\r\nb\r", "\t\t  x", "I'VE we'Ll 'ſ don’t", "12345 6.7",
          "\x00\x07\x7f", "e\u0301 é ﬁ ﷺ", "👩\u200d👩\u200d👧 🇩🇪", "東京の犬", "עברית हिन्दी 한국어",
          "\u00a0\u3000\u2028 x", "\ufeff\ufffd\U0010ffff"]
CONVERSATIONS = [
    [dict(role="user", content="Where does Milo live?")],
    [dict(role="system", content="Be kind.\n"), dict(role="user", content=" \nHi! "),
     dict(role="assistant", content="Hello, 世界.\n\n"), dict(role="user", content="")]]
# What llama.cpp's converter encodes to tell one tokenizer from another, and the hash of Qwen's ids.
LLAMA_CPP_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶‍🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL")
QWEN2 = "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea"


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs: pip install transformers")


def tool(*arguments):
    """The tool as its user calls it, in this process."""
    huggingface.main([str(argument) for argument in arguments])


def refusal(*arguments):
    """The line in which it ends."""
    return one_line(tool, *arguments)


def load_model(path, cls=LanguageModel):
    return restore(cls, load_checkpoint(str(path), "the test"), "cpu").eval()


def greedy(model, tokenizer, ids, n):
    return generate(model, [ids], n, tokenizer.end, torch.zeros(1, n), temperature=0)[0]


def random_texts(n, seed=0):
    """Texts of letters of all kinds, of words, blanks and signs."""
    rng = random.Random(seed)
    pieces = [*TRICKY, *"the fox lives in Milo's mill 'll 'RE ... !? \n \r\n".split(" "), " ", "  "]
    texts = []
    for _ in range(n):
        letters = [chr(rng.randrange(32, 127 if i % 2 else 0xd800)) for i in range(8)]
        texts.append("".join(rng.choices(pieces + letters, k=rng.randrange(12))))
    return texts


@pytest.fixture(scope="module")
def checkpoints(folder, tmp_path_factory):
    """A folder with the miniature's tokenizer and two models of random weights, tied.pt and
    untied.pt."""
    out = copy(folder, tmp_path_factory.mktemp("random"), ["tokenizer.tiktoken"])
    run, _ = one_process(PrepareConfig, out_dir=str(out))
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.size == V
    for name, shape in dict(tied=TIED, untied=UNTIED).items():
        run.save(f"{name}.pt", tiny(LanguageModel, **shape), 1, tokenizer=tokenizer.hash)
    reward = tiny(ScalarModel, **UNTIED)
    torch.nn.init.constant_(reward.score.bias, 0.75)
    run.save("reward.pt", reward, 1, tokenizer=tokenizer.hash)
    return out


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """The same as folders of Hugging Face's."""
    to = tmp_path_factory.mktemp("exported")
    for name in ("tied", "untied", "reward"):
        tool("export", checkpoints / f"{name}.pt", to / name)
    return to


@pytest.fixture(scope="module")
def their_tokenizer(transformers, exported):
    return transformers.AutoTokenizer.from_pretrained(exported / "tied")


# --------------------------------------------------------------------------------------------------
# The tokenizer

def test_the_pattern_is_qwens():
    """By these letters converters recognise the tokenizer: "qwen2" in llama.cpp."""
    assert hashlib.sha256(PATTERN.encode()).hexdigest().startswith("1ff7f410")


def test_merges_by_hand():
    """Tokens ab, abc, bc, abcabc were merged from a b, ab c, b c and abc abc; the blank is Ġ."""
    single = [bytes([byte]) for byte in range(256)]
    tokenizer = Tokenizer([*single, b"ab", b"abc", b"bc", b"abcabc", b" a"])
    tokens, merges = huggingface.tokens_and_merges(tokenizer)
    assert merges == ["a b", "ab c", "b c", "abc abc", "Ġ a"]
    assert tokens[256:] == ["ab", "abc", "bc", "abcabc", "Ġa"] and tokens[0] == "Ā"
    assert len(set(tokens)) == 261
    message = one_line(huggingface.tokens_and_merges, Tokenizer([*single, b"xyz"]))
    assert "xyz" in message


def test_any_tokenizer_gives_the_same_ids_elsewhere(transformers):
    """Tokenizers trained on texts of few letters, in which merges overlap in every way."""
    from tokenizers import Tokenizer as Theirs
    rng = random.Random(0)
    for letters in ("a", "ab", "abc ", "aé\n", "a1 '.\n"):
        texts = ["".join(rng.choices(letters, k=40)) for _ in range(300)]
        tokenizer = Tokenizer(train_bpe(texts[:100], 330))
        theirs = Theirs.from_str(json.dumps(huggingface.tokenizer_json(tokenizer)))
        for text in texts:
            assert theirs.encode(text).ids == tokenizer.encode(text), text


def test_ids_of_texts(exported, checkpoints, their_tokenizer):
    """A thousand random texts have the same ids in transformers, and come back as they were."""
    tokenizer = load_tokenizer(str(checkpoints))
    assert len(their_tokenizer) == tokenizer.size
    for text in [*TRICKY, *random_texts(1000)]:
        ids = their_tokenizer(text, add_special_tokens=False).input_ids
        assert ids == tokenizer.encode(text), text
        assert their_tokenizer.decode(ids) == text


@pytest.mark.parametrize("reply", [False, True])
def test_ids_of_conversations(checkpoints, their_tokenizer, reply):
    """The chat template is what `render` writes, with the special tokens as single ids."""
    tokenizer = load_tokenizer(str(checkpoints))
    for messages in CONVERSATIONS:
        ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=reply,
                                                  return_dict=False)
        assert ids == render(tokenizer, messages, reply)[0]
        assert "<|im" not in their_tokenizer.decode(ids, skip_special_tokens=True)
    assert their_tokenizer.eos_token_id == tokenizer.end
    assert their_tokenizer.pad_token_id == tokenizer.end_of_text


def qwen_vocabulary():
    """Qwen's own tokenizer.tiktoken, which lies in a package of the same makers."""
    package = importlib.util.find_spec("dashscope")
    path = package and Path(package.origin).parent / "resources/qwen.tiktoken"
    if not path or not path.exists():
        pytest.skip("needs: pip install --no-deps dashscope==2.0.2")
    return path


def test_qwens_own_vocabulary(tmp_path):
    """Qwen's vocabulary is read as it is. Its special tokens have the ids they have in Qwen3, the
    text by which llama.cpp recognises it has the ids of Qwen2, and its merges are found again."""
    shutil.copy(qwen_vocabulary(), tmp_path / "tokenizer.tiktoken")
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.end_of_text, tokenizer.start, tokenizer.end) == (151643, 151644, 151645)
    ids = tokenizer.encode(LLAMA_CPP_TEXT)
    assert hashlib.sha256(str(ids).encode()).hexdigest() == QWEN2
    file = huggingface.tokenizer_json(tokenizer)
    assert len(file["model"]["merges"]) == 151643 - 256
    (tmp_path / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    tokens = huggingface.read_tokenizer_json(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tokens).hash == tokenizer.hash


# --------------------------------------------------------------------------------------------------
# Out: transformers

@pytest.mark.parametrize("name", ["tied", "untied"])
def test_transformers_says_the_same(transformers, exported, checkpoints, name):
    """Logits within 2·10⁻⁵, and greedy generation token for token, from the folder alone."""
    tokenizer, model = load_tokenizer(str(checkpoints)), load_model(checkpoints / f"{name}.pt")
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        exported / name, output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32
    tokens = torch.randint(0, V, (3, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(tokens)
        close(theirs(tokens).logits, ours, 2e-5)
    assert ours.abs().max() > 0.5
    for messages in CONVERSATIONS:
        ids = prompt_ids(tokenizer, messages)
        said = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False,
                               eos_token_id=tokenizer.end)
        assert said[0, len(ids):].tolist() == greedy(model, tokenizer, ids, 40)


def test_what_transformers_reads_of_the_configuration(transformers, exported, checkpoints):
    """How to sample and when to stop, as sample.py does; the values that stand twice are equal."""
    tokenizer = load_tokenizer(str(checkpoints))
    settings = transformers.GenerationConfig.from_pretrained(exported / "untied")
    assert settings.eos_token_id == [tokenizer.end, tokenizer.end_of_text]
    assert (settings.do_sample, settings.top_k, settings.top_p) == (True, 0, 1.0)
    config = read_json(exported / "untied/config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert config["dtype"] == config["torch_dtype"] == "float32" and config["head_dim"] == 12
    template = (exported / "untied/chat_template.jinja").read_text()
    assert template == read_json(exported / "untied/tokenizer_config.json")["chat_template"]


def test_scores_of_the_reward_model(transformers, exported, checkpoints, capsys):
    """Qwen3ForSequenceClassification gives the reward model's scores, but for the bias."""
    model = load_model(checkpoints / "reward.pt", ScalarModel)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(exported / "reward")
    assert theirs.config.num_labels == 1
    tokens = torch.randint(0, V - 3, (4, 50), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([50, 3, 20, 49])
    for row, length in zip(tokens, lengths):
        row[length:] = theirs.config.pad_token_id
    with torch.no_grad():
        scores = theirs(tokens, attention_mask=tokens != theirs.config.pad_token_id).logits[:, 0]
        close(scores + 0.75, model(tokens, lengths), 2e-5)
    assert scores.std() > 0.1


def test_what_the_reward_model_loses_is_said(checkpoints, tmp_path, capsys):
    tool("export", checkpoints / "reward.pt", tmp_path / "reward")
    assert "no bias" in (said := capsys.readouterr().out) and "-0.75" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_another_dtype(transformers, checkpoints, tmp_path, dtype):
    """--dtype rounds every weight, and the folder says so."""
    tool("export", checkpoints / "tied.pt", tmp_path / "model", f"--dtype={dtype}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    for name, tensor in load_model(checkpoints / "tied.pt").state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor.to(getattr(torch, dtype))), name


@pytest.mark.parametrize("stage", ["sft", "ppo.last"])
def test_checkpoints_of_every_stage(folder, tmp_path, stage):
    """What other stages write becomes a folder, too: that of a resumable run is no other."""
    tool("export", folder / f"{stage}.pt", tmp_path / "model")
    state = huggingface.read_safetensors(str(tmp_path / "model/model.safetensors"))
    checkpoint = load_checkpoint(str(folder / f"{stage}.pt"), "")["model"]
    assert state.keys() == checkpoint.keys() - {"lm_head.weight"}
    assert all(torch.equal(state[name], checkpoint[name]) for name in state)


# --------------------------------------------------------------------------------------------------
# Out: llama.cpp

def llama_cpp(path):
    """llama.cpp in this process, as its server answers."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs: pip install xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 128, 1
    settings.warmup, settings.cpuparams.n_threads, settings.verbosity = False, 1, -1
    return xllamacpp.Server(settings)


def answer(server, messages, n):
    reply = server.handle_chat_completions(dict(messages=messages, temperature=0, max_tokens=n,
                                                reasoning_format="none"))
    return reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("which", ["trained", "untied"])
def test_llama_cpp_says_the_same(folder, checkpoints, tmp_path, which):
    """Forty greedy answers of llama.cpp's chat are those of generate()."""
    path = folder / "ppo.pt" if which == "trained" else checkpoints / "untied.pt"
    tool("export", path, tmp_path / "model.gguf")
    server = llama_cpp(tmp_path / "model.gguf")
    tokenizer, model = load_tokenizer(str(folder)), load_model(path)
    prompts = [r["prompt"] for name in ("eval", "prompts")
               for r in read_jsonl(str(folder / f"{name}.jsonl"))]
    conversations = [CONVERSATIONS[1], *map(as_messages, prompts)][:40]
    said = []
    for messages in conversations:
        ids = greedy(model, tokenizer, prompt_ids(tokenizer, messages), 16)
        said.append(tokenizer.text(ids).rstrip("\ufffd \n\t"))  # as llama.cpp's server does
        assert answer(server, messages, 16).rstrip("\ufffd \n\t") == said[-1], messages
    assert len(said) == 40 and len(set(said)) > 1


def read_gguf(path):
    """The values of a GGUF file, its tensors as {name: (shape, code of the dtype, where its data
    begin)}, and its bytes."""
    data, at = path.read_bytes(), 0

    def take(form):
        nonlocal at
        at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, data, at - struct.calcsize("<" + form))

    def text():
        return take(f"{take('Q')[0]}s")[0].decode()

    def value(code):
        if code == 9:
            kind, n = take("I") + take("Q")
            return [value(kind) for _ in range(n)]
        return text() if code == 8 else take({4: "I", 5: "i", 6: "f", 7: "?"}[code])[0]

    magic, version, n_tensors, n_values = take("4s") + take("I") + take("QQ")
    assert (magic, version) == (b"GGUF", 3)
    values, tensors = {}, {}
    for _ in range(n_values):
        name = text()
        values[name] = value(take("I")[0])
    for _ in range(n_tensors):
        name, n = text(), take("I")[0]
        tensors[name] = take(f"{n}Q")[::-1], *take("I"), *take("Q")
    start = at + -at % 32
    return values, {k: (shape, code, start + at) for k, (shape, code, at) in tensors.items()}, data


@pytest.mark.parametrize("dtype, code", [("float32", 0), ("float16", 1), ("bfloat16", 30)])
def test_gguf_holds_the_weights(checkpoints, tmp_path, dtype, code):
    """Read by another reader: matrices in the dtype asked for, norms in float32, all bit for
    bit and at multiples of 32 bytes; how text is tokenised, and what ends an answer; the types of
    tokens as int32, which is what the format asks for."""
    path = tmp_path / "new/model.gguf"
    tool("export", checkpoints / "untied.pt", path, f"--dtype={dtype}")
    values, tensors, data = read_gguf(path)
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "qwen2"
    assert values["tokenizer.ggml.eos_token_id"] == V - 1
    assert values["tokenizer.ggml.padding_token_id"] == V - 3
    assert values["tokenizer.ggml.token_type"] == [1] * (V - 3) + [3] * 3
    assert b"token_type\x09\x00\x00\x00\x05\x00\x00\x00" in data
    assert values["tokenizer.ggml.tokens"][-3:] == list(SPECIAL)
    state = load_model(checkpoints / "untied.pt").state_dict()
    assert len(tensors) == len(state) == 25
    for ours, theirs in {"model.embed_tokens": "token_embd", "lm_head": "output",
                         "model.layers.1.self_attn.o_proj": "blk.1.attn_output",
                         "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
                         "model.layers.1.self_attn.k_norm": "blk.1.attn_k_norm",
                         "model.norm": "output_norm"}.items():
        tensor = state[ours + ".weight"].to(getattr(torch, dtype))
        tensor = tensor if tensor.dim() > 1 else tensor.float()
        shape, found, start = tensors[theirs + ".weight"]
        assert (shape, found) == (tuple(tensor.shape), code if tensor.dim() > 1 else 0), theirs
        assert start % 32 == 0
        read = torch.frombuffer(bytearray(data[start:start + tensor.nbytes]), dtype=tensor.dtype)
        assert torch.equal(read.view(tensor.shape), tensor), theirs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_llama_cpp_reads_other_dtypes(folder, tmp_path, dtype):
    """With rounded weights and products most of the answers stay the same."""
    tool("export", folder / "ppo.pt", tmp_path / "model.gguf", f"--dtype={dtype}")
    server, tokenizer = llama_cpp(tmp_path / "model.gguf"), load_tokenizer(str(folder))
    model, same = load_model(folder / "ppo.pt"), 0
    for record in read_jsonl(str(folder / "eval.jsonl"))[:10]:
        ids = greedy(model, tokenizer, prompt_ids(tokenizer, record["prompt"]), 4)
        same += answer(server, as_messages(record["prompt"]), 4) == tokenizer.text(ids)
    assert same >= 7


# --------------------------------------------------------------------------------------------------
# In

def qwen3(transformers, to, tokenizer_from, shard="1GB", vocab_size=V, **more):
    """A folder as transformers saves it, of random weights, with a tokenizer of ours."""
    torch.manual_seed(0)
    config = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
                  max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.2,
                  rope_parameters=dict(rope_type="default", rope_theta=1e6), bos_token_id=None,
                  eos_token_id=V - 1, pad_token_id=V - 3) | more
    dtype = config.pop("dtype", torch.float32)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config)).to(dtype)
    model.save_pretrained(to, max_shard_size=shard)
    shutil.copy(tokenizer_from / "tokenizer.json", to)
    return transformers.Qwen3ForCausalLM.from_pretrained(to, dtype=torch.float32)


@pytest.mark.parametrize("more", [
    dict(), dict(tie_word_embeddings=False), dict(dtype=torch.bfloat16), dict(shard="20KB"),
    dict(tie_word_embeddings=False, dtype=torch.bfloat16, shard="20KB", head_dim=8)], ids=str)
def test_in_and_out_again_is_bit_identical(transformers, exported, tmp_path, more):
    """A folder that transformers has saved: the imported model has its logits, and exported again
    it has every tensor bit for bit."""
    from safetensors.torch import load_file
    theirs = qwen3(transformers, tmp_path / "qwen", exported / "tied", **more)
    assert len(list((tmp_path / "qwen").glob("*.safetensors"))) > 1 or "shard" not in more
    tool("import", tmp_path / "qwen", f"--out_dir={tmp_path}/run", "--block_size=64")
    model, tokens = load_model(tmp_path / "run/pretrain.pt"), torch.arange(64)[None]
    c = model.model.config
    assert (c.block_size, c.rope_theta, c.vocab_size) == (64, 1e6, V)
    with torch.no_grad():
        close(model(tokens), theirs(tokens).logits, 2e-5)
    tool("export", tmp_path / "run/pretrain.pt", tmp_path / "again")
    before = {}
    for path in (tmp_path / "qwen").glob("*.safetensors"):
        before |= load_file(path)
    after = load_file(tmp_path / "again/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def test_rows_that_belong_to_no_token(transformers, exported, tmp_path, capsys):
    """An embedding of more rows than there are tokens, as Qwen3's: the rest is left out, which is
    said, so that it cannot be sampled. The other logits are the same."""
    theirs = qwen3(transformers, tmp_path / "qwen", exported / "tied", vocab_size=V + 20)
    tool("import", tmp_path / "qwen", f"--out_dir={tmp_path}/run")
    assert "20 rows" in capsys.readouterr().out
    model, tokens = load_model(tmp_path / "run/pretrain.pt"), torch.arange(64)[None]
    with torch.no_grad():
        close(model(tokens), theirs(tokens).logits[..., :V], 2e-5)
    saved = torch.load(tmp_path / "run/pretrain.pt", weights_only=True)["model"]
    assert saved["lm_head.weight"].untyped_storage().nbytes() == V * 32 * 4


def test_without_transformers(checkpoints, exported, tmp_path):
    """What this project exports it imports: the same tokenizer and weights, the same files again,
    byte for byte."""
    for name in ("tied", "untied"):
        run = tmp_path / f"{name}.run"
        tool("import", exported / name, f"--out_dir={run}")
        assert ((run / "tokenizer.tiktoken").read_bytes()
                == (checkpoints / "tokenizer.tiktoken").read_bytes())
        before, after = load_model(checkpoints / f"{name}.pt"), load_model(run / "pretrain.pt")
        assert before.model.config == after.model.config
        assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
        tool("export", run / "pretrain.pt", tmp_path / name)
        for path in (exported / name).iterdir():
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path.name
        weights = (exported / name / "model.safetensors").read_bytes()
        assert int.from_bytes(weights[:8], "little") % 8 == 0  # tensors begin at multiples of 8


def test_fine_tuning_an_imported_model(folder, tmp_path):
    """From a folder to a chat model: import, data with the model's tokenizer, sft.py, sample.py."""
    out = tmp_path / "run"
    tool("export", folder / "pretrain.pt", tmp_path / "qwen", "--dtype=bfloat16")
    tool("import", tmp_path / "qwen", f"--out_dir={out}")
    given = (out / "tokenizer.tiktoken").read_bytes()
    succeed("prepare", out, *prepare_options(out), "--vocab_size=400",
            f"--tokenizer={out}/tokenizer.tiktoken")
    assert (out / "tokenizer.tiktoken").read_bytes() == given
    tokens = np.fromfile(out / "val.bin", np.uint16)
    assert " the " in load_tokenizer(str(out)).decode(tokens.tolist())
    succeed("sft", out, *OPTIONS["sft"], "--epochs=1")
    succeed("sample", out, "--prompt=Where does Milo live?")
    tool("export", out / "sft.pt", tmp_path / "tuned")


def test_prepare_needs_the_tokenizer_that_is_named(folder, tmp_path):
    """--tokenizer: a file that is missing or no tokenizer is named in one line."""
    (tmp_path / "bad").write_text("once upon a time\n" * 300)
    for name, remedy in (("none", "huggingface.py import"), ("bad", "damaged")):
        message = fail("prepare", tmp_path / "run", f"--text={folder}/world/pages.jsonl",
                       f"--tokenizer={tmp_path / name}")
        assert str(tmp_path / name) in message and remedy in message
        assert not (tmp_path / "run/kept.tmp").exists()  # it is read before the long work


def change_json(path, **values):
    path.write_text(json.dumps(read_json(path) | values), encoding="utf-8")


def change_tokenizer(path, change):
    file = read_json(path)
    change(file)
    path.write_text(json.dumps(file), encoding="utf-8")


def split_as_gpt2(file):
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"


FAULTS = {
    "another architecture": (lambda f: change_json(
        f / "config.json", architectures=["LlamaForCausalLM"]), ["config.json", "Llama"]),
    "scaled rotary": (lambda f: change_json(f / "config.json", rope_parameters=dict(
        rope_type="yarn", rope_theta=1e6)), ["config.json", "yarn"]),
    "scaled as in version 4": (lambda f: change_json(f / "config.json", rope_scaling=dict(
        rope_type="yarn", factor=4.0)), ["config.json", "yarn"]),
    "another epsilon": (lambda f: change_json(f / "config.json", rms_norm_eps=1e-5),
                        ["config.json", "rms_norm_eps"]),
    "no number": (lambda f: change_json(f / "config.json", hidden_size=None), ["config.json"]),
    "a key missing": (lambda f: (f / "config.json").write_text(
        '{"architectures": ["Qwen3ForCausalLM"]}'), ["config.json", "num_hidden_layers"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "a damaged config": (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
    "another split": (lambda f: change_tokenizer(f / "tokenizer.json", split_as_gpt2),
                      ["tokenizer.json", "words"]),
    "another order of merges": (lambda f: change_tokenizer(
        f / "tokenizer.json", lambda file: file["model"]["merges"].reverse()),
        ["tokenizer.json", "merges"]),
    "no special tokens": (lambda f: change_json(f / "tokenizer.json", added_tokens=[]),
                          ["tokenizer.json", SPECIAL[0]]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "another shape": (lambda f: change_json(f / "config.json", intermediate_size=64),
                      ["mlp", "48", "64"]),
    "a layer too few": (lambda f: change_json(f / "config.json", num_hidden_layers=1),
                        ["layers.1."]),
    "an untied head missing": (lambda f: change_json(f / "config.json", tie_word_embeddings=False),
                               ["lm_head.weight"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "a shard missing": (lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "model-1.safetensors"}}'), ["model-1.safetensors"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_cannot_be_imported(exported, tmp_path, fault):
    """What is wrong is named in one line, and no run folder is made."""
    damage, words = FAULTS[fault]
    shutil.copytree(exported / "tied", tmp_path / "qwen")
    damage(tmp_path / "qwen")
    message = refusal("import", tmp_path / "qwen", f"--out_dir={tmp_path}/run")
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cut", [0, 5, 100, 3000, -1])
def test_truncated_weights(exported, tmp_path, cut):
    """A download that was cut off is named in one line."""
    shutil.copytree(exported / "tied", tmp_path / "qwen")
    path = tmp_path / "qwen/model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert str(path) in refusal("import", tmp_path / "qwen", f"--out_dir={tmp_path}/run")
    path.write_bytes(b"\xff" * 100)
    assert str(path) in refusal("import", tmp_path / "qwen", f"--out_dir={tmp_path}/run")


# --------------------------------------------------------------------------------------------------
# Nothing of the user's is overwritten

@pytest.mark.parametrize("there", ["pretrain.pt", "tokenizer.tiktoken"])
def test_import_leaves_a_run_folder_alone(exported, tmp_path, there):
    (tmp_path / there).write_text("mine")
    message = refusal("import", exported / "tied", f"--out_dir={tmp_path}")
    assert there in message and [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize("to", ["folder", "file", "file.gguf"])
def test_export_leaves_what_is_there(checkpoints, tmp_path, to):
    (tmp_path / "folder").mkdir()
    for name in ("folder/mine", "file", "file.gguf"):
        (tmp_path / name).write_text("mine")
    assert "is there already" in refusal("export", checkpoints / "tied.pt", tmp_path / to)
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"] * 3


def test_wrong_uses_of_export(folder, checkpoints, tmp_path):
    """A stage not run yet, a reward model as GGUF, a tokenizer of another run, a misspelt option:
    one line each, and nothing is written."""
    copy(folder, tmp_path, ["tokenizer.tiktoken", "reward.pt"])
    message = refusal("export", tmp_path / "ppo.pt", tmp_path / "new")
    assert "ppo.pt" in message and "python ppo.py" in message
    assert "reward model" in refusal("export", tmp_path / "reward.pt", tmp_path / "new.gguf")
    lines = (tmp_path / "tokenizer.tiktoken").read_text().splitlines(keepends=True)
    (tmp_path / "tokenizer.tiktoken").write_text("".join(lines[:-1]))
    message = refusal("export", tmp_path / "reward.pt", tmp_path / "new")
    assert "another tokenizer" in message and "python reward.py" in message
    message = refusal("export", checkpoints / "tied.pt", tmp_path / "new", "--dtyp=float16")
    assert "--dtyp" in message
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.gguf").exists()
