"""Models out to the formats of Hugging Face and llama.cpp, and pretrained Qwen3 models in.

    python tools/huggingface.py export out/tiny/ppo.pt ../milo            a folder: transformers, …
    python tools/huggingface.py export out/tiny/ppo.pt ../milo/milo.gguf  a file: llama.cpp, …
    python tools/huggingface.py import ../Qwen3-0.6B --out_dir=out/qwen   a run folder, to tune it

The modules of model.py carry Hugging Face's names, so the weights only change their container. Most
of this script is about the tokenizer, which has to give the same ids everywhere. One thing differs:
here <|im_end|> in a user's message stays plain text, there it ends the message.

An imported model stands in for what pretrain.py makes. `python prepare.py --tokenizer=…` prepares
data with its tokenizer; then sft.py, reward.py and ppo.py go on as ever (configs/qwen.toml).
"""

import argparse
import base64
import json
import os
import struct
import sys
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from model import (LanguageModel, ModelConfig, Parser, load_checkpoint,  # noqa: E402
                   lock_folder, replacing)
from prepare import PATTERN, SPECIAL, Tokenizer, load_tokenizer  # noqa: E402

# What every model of this project has. With another value it is another architecture.
FIXED = dict(hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False, use_sliding_window=False)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors
# ChatML as prepare.render has it: a newline stands before every turn but the first.
CHAT_TEMPLATE = (
    r"{% for message in messages %}{{ ('' if loop.first else '\n') + '<|im_start|>' + "
    r"message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}")


@contextmanager
def reading(path):
    """Whatever is wrong with a file that is imported ends in one line."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise SystemExit(f"{path} is damaged or not like Qwen3's: {error!r}")


def read_json(path):
    with reading(path), open(path, encoding="utf-8") as f:
        return json.load(f)


# --------------------------------------------------------------------------------------------------
# The tokenizer

def byte_letters():
    """GPT-2's letter for each byte, {byte: letter}: the Latin-1 letter where that can be seen, else
    one from 256 on. Tokens are written in these letters, as JSON can hold text but no bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def tokens_and_merges(tokenizer):
    """What other programs want to know of a tokenizer, in byte letters and in order of rank: its
    tokens without the special ones, and its merges, "a b" for each token of several bytes.

    tiktoken keeps only ranks. The pair that a token was merged from is what is left of its bytes
    when all merges of a lower rank have been made."""
    as_bytes = map(tokenizer.encoding.decode_single_token_bytes, range(tokenizer.end_of_text))
    tokens = [token.decode("latin-1").translate(LETTERS) for token in as_bytes]
    ranks, merges = {token: rank for rank, token in enumerate(tokens)}, []
    for rank, token in enumerate(tokens):
        parts = list(token)
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            lowest = min(joined)
            if lowest == rank:
                raise SystemExit(f"no merges of the tokenizer's make its token {token!r}")
            i = joined.index(lowest)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(parts))
    return tokens, merges


def tokenizer_json(tokenizer):
    """tokenizer.json, which the library behind transformers reads."""
    tokens, merges = tokens_and_merges(tokenizer)
    special = [dict(id=len(tokens) + i, content=text, single_word=False, lstrip=False, rstrip=False,
                    normalized=False, special=True) for i, text in enumerate(SPECIAL)]
    split = dict(type="Split", pattern=dict(Regex=PATTERN), behavior="Isolated", invert=False)
    as_bytes = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    vocab = {token: rank for rank, token in enumerate(tokens)}
    return dict(version="1.0", added_tokens=special, normalizer=None, post_processor=None,
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, as_bytes]),
                decoder=as_bytes, model=dict(type="BPE", vocab=vocab, merges=merges))


def read_tokenizer_json(path):
    """The tokens of a tokenizer.json, in order of rank, if it works as those of Qwen3 do."""
    file = read_json(path)
    with reading(path):
        ranks, merges = file["model"]["vocab"], file["model"]["merges"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        merged = [ranks[a + b] for a, b in pairs]
        special = {token["id"]: token["content"] for token in file["added_tokens"]}
        if merged != sorted(merged) or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("the order of its merges is not that of its tokens")
        if tuple(special.get(len(ranks) + i) for i in range(3)) != SPECIAL:
            raise ValueError(f"the tokens after its vocabulary are not {SPECIAL}")
        if file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] != PATTERN:
            raise ValueError("it splits text into words in another way")
        return [bytes(BYTES[letter] for letter in token) for token in sorted(ranks, key=ranks.get)]


# --------------------------------------------------------------------------------------------------
# Folders of Hugging Face's

def raw(tensor):
    """The bytes of a tensor; through uint8, as numpy has no bfloat16."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def write_safetensors(path, tensors):
    """The length of a header; the header, which says where each tensor lies; then the tensors."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[start, end])
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            f.write(raw(tensor))


def read_safetensors(path):
    """The tensors of a file, by name."""
    tensors = {}
    with reading(path), open(path, "rb") as f:
        start_of_data = 8 + int.from_bytes(f.read(8), "little")
        if start_of_data > os.path.getsize(path):
            raise ValueError("it ends within its header")
        header = json.loads(f.read(start_of_data - 8))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            f.seek(start_of_data + start)
            data = bytearray(f.read(end - start))
            tensor = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]])
            tensors[name] = tensor.view(entry["shape"])
    return tensors


def write_folder(folder, c, state, tokenizer):
    """All that transformers needs to load a model and its tokenizer. Its versions 4 and 5, and
    vLLM, look for some values under different names, so these stand here twice."""
    dtype = str(state["model.norm.weight"].dtype)[6:]
    config = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=c.vocab_size,
        hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
        max_position_embeddings=c.block_size, tie_word_embeddings=c.tie_embeddings, dtype=dtype,
        torch_dtype=dtype, rope_theta=c.rope_theta, bos_token_id=None, eos_token_id=tokenizer.end,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        pad_token_id=tokenizer.end_of_text) | FIXED
    tokenizer_config = dict(  # with another class, text would be split and normalised differently
        tokenizer_class="PreTrainedTokenizerFast", eos_token=SPECIAL[2], pad_token=SPECIAL[0],
        model_max_length=c.block_size, clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE)
    generation_config = dict(  # without top_k=0 it would be 50
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.end_of_text,
        eos_token_id=[tokenizer.end, tokenizer.end_of_text])
    if "score.weight" in state:  # one label, for one number
        config |= dict(architectures=["Qwen3ForSequenceClassification"], id2label={"0": "reward"},
                       label2id={"reward": 0})
    os.makedirs(folder, exist_ok=True)
    for name, content in dict(config=config, tokenizer=tokenizer_json(tokenizer),
                              tokenizer_config=tokenizer_config,
                              generation_config=generation_config).items():
        with replacing(os.path.join(folder, f"{name}.json")) as f:
            f.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    with replacing(os.path.join(folder, "chat_template.jinja")) as f:
        f.write(CHAT_TEMPLATE)
    write_safetensors(os.path.join(folder, "model.safetensors"), state)


# --------------------------------------------------------------------------------------------------
# GGUF, the file of llama.cpp

GGUF_TYPES = {int: (4, "I"), np.int32: (5, "i"), float: (6, "f"), bool: (7, "?")}
GGUF_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}


def gguf_text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value):
    """A value of the header: the code of its type, and its bytes."""
    if isinstance(value, str):
        return 8, gguf_text(value)
    if type(value) in GGUF_TYPES:
        code, letter = GGUF_TYPES[type(value)]
        return code, struct.pack("<" + letter, value)
    items = [gguf_value(item) for item in value]  # a list, whose items are of one type
    return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(data for _, data in items)


def write_gguf(path, c, state, tokenizer):
    """Version 3 of the format: values, then names and shapes of the tensors, then the tensors."""
    tokens, merges = tokens_and_merges(tokenizer)
    values = {
        "general.architecture": "qwen3", "qwen3.block_count": c.n_layer,
        "qwen3.context_length": c.block_size, "qwen3.embedding_length": c.n_embd,
        "qwen3.feed_forward_length": c.n_inner, "qwen3.attention.head_count": c.n_head,
        "qwen3.attention.head_count_kv": c.n_kv_head, "qwen3.attention.key_length": c.head_dim,
        "qwen3.attention.value_length": c.head_dim, "qwen3.rope.freq_base": c.rope_theta,
        "qwen3.attention.layer_norm_rms_epsilon": FIXED["rms_norm_eps"],
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",  # its name for PATTERN
        "tokenizer.ggml.tokens": [*tokens, *SPECIAL], "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.int32([1] * len(tokens) + [3] * len(SPECIAL)),  # 3: control
        "tokenizer.ggml.eos_token_id": tokenizer.end, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.padding_token_id": tokenizer.end_of_text,
        "tokenizer.chat_template": CHAT_TEMPLATE}
    header = b"GGUF" + struct.pack("<IQQ", 3, len(state), len(values))
    for name, value in values.items():
        code, data = gguf_value(value)
        header += gguf_text(name) + struct.pack("<I", code) + data
    tensors, offset = [], 0
    for name, tensor in state.items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours + ".", theirs + ".")
        tensor = tensor if tensor.dim() > 1 else tensor.float()  # the gains of the norms, always
        shape = tensor.shape[::-1]  # the index that runs fastest comes first
        header += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape,
                                                GGUF_DTYPES[tensor.dtype], offset)
        offset += tensor.nbytes + -tensor.nbytes % 32
        tensors.append(tensor)
    with replacing(path, "wb") as f:
        f.write(header + bytes(-len(header) % 32))
        for tensor in tensors:
            f.write(raw(tensor))
            f.write(bytes(-tensor.nbytes % 32))


# --------------------------------------------------------------------------------------------------
# The commands

def export_model(args):
    """Write the model of a checkpoint as a folder, or as one file if its name ends in .gguf."""
    folder, name = os.path.split(args.checkpoint)
    tokenizer = load_tokenizer(folder)
    stage = name.split(".")[0].split("-")[0]
    checkpoint = load_checkpoint(args.checkpoint, f"python {stage}.py", tokenizer.hash)
    state, c = checkpoint["model"], checkpoint["model_config"]
    if os.path.isfile(args.to) or os.path.isdir(args.to) and os.listdir(args.to):
        raise SystemExit(f"{args.to} is there already: remove it, or name another")
    if c.tie_embeddings:
        state.pop("lm_head.weight", None)
    if args.dtype:
        state = {name: tensor.to(getattr(torch, args.dtype)) for name, tensor in state.items()}
    bias = state.pop("score.bias", None)
    if not args.to.endswith(".gguf"):
        write_folder(args.to, c, state, tokenizer)
    elif bias is None:
        os.makedirs(os.path.dirname(args.to) or ".", exist_ok=True)
        write_gguf(args.to, c, state, tokenizer)
    else:
        raise SystemExit(f"{args.checkpoint} is a reward model: it can become a folder, no .gguf")
    n_weights = sum(tensor.numel() for tensor in state.values())
    print(f"{args.to}: {n_weights:,} weights, {tokenizer.size:,} tokens")
    if bias is not None:
        print(f"Qwen3ForSequenceClassification has no bias: all its scores are {-bias.item():+.4f} "
              "off, which changes no preference")


def read_config(path, tokenizer, block_size):
    """The ModelConfig that a config.json stands for."""
    config = read_json(path)
    with reading(path):
        if config["architectures"] != ["Qwen3ForCausalLM"]:
            raise ValueError(f"the architecture is {config['architectures']}, not Qwen3ForCausalLM")
        for name, value in FIXED.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name} is {config[name]}, not {value}")
        rope = config.get("rope_parameters") or config  # of version 5, or of version 4
        scaling = config.get("rope_scaling") or rope
        if scaling.get("rope_type", "default") != "default":
            raise ValueError(f"the rotary positions are scaled: {scaling}")
        return ModelConfig(
            n_layer=config["num_hidden_layers"], n_head=config["num_attention_heads"],
            n_kv_head=config["num_key_value_heads"], n_embd=config["hidden_size"],
            head_dim=config["head_dim"], n_inner=config["intermediate_size"],
            block_size=min(block_size, config["max_position_embeddings"]),
            rope_theta=float(rope["rope_theta"]), vocab_size=tokenizer.size,
            tie_embeddings=config["tie_word_embeddings"])


def import_model(args):
    """Make a run folder with tokenizer.tiktoken and pretrain.pt from a folder of Hugging Face's."""
    new = [os.path.join(args.out_dir, name) for name in ("pretrain.pt", "tokenizer.tiktoken")]
    for path in filter(os.path.exists, new):
        raise SystemExit(f"{path} is there already: name another --out_dir")
    tokens = read_tokenizer_json(os.path.join(args.folder, "tokenizer.json"))
    tokenizer = Tokenizer(tokens)
    c = read_config(os.path.join(args.folder, "config.json"), tokenizer, args.block_size)
    files = ["model.safetensors"]
    index = os.path.join(args.folder, "model.safetensors.index.json")
    if os.path.exists(index):
        with reading(index):
            files = sorted(set(read_json(index)["weight_map"].values()))
    state = {}
    for name in files:
        state |= read_safetensors(os.path.join(args.folder, name))
    # The matrices may have more rows than there are tokens. The model is to sample none of those.
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & state.keys():
        n_rows = len(state[name])
        state[name] = state[name][:tokenizer.size].clone()
    if c.tie_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with reading(os.path.join(args.folder, "config.json")), torch.device("meta"):  # takes no memory
        expected = LanguageModel(c).state_dict()
    for name in sorted(expected.keys() | state.keys()):
        found, wanted = [tensors[name].shape if name in tensors else None
                         for tensors in (state, expected)]
        if found != wanted:
            raise SystemExit(f"{args.folder}: {name} should be {wanted}, and is {found}")
    lock = lock_folder(args)  # noqa: F841  held until the process ends
    with replacing(new[0], "wb") as f:
        torch.save(dict(model=state, model_config=asdict(c), step=0, config={}, parent=args.folder,
                        dtype=str(state["model.norm.weight"].dtype)[6:],
                        tokenizer=tokenizer.hash), f)
    with replacing(new[1]) as f:
        f.writelines(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))
    if n_rows > tokenizer.size:
        print(f"left out: {n_rows - tokenizer.size} rows of the embedding, whose tokens (<think>, "
              "tools, none at all) this project does not know")
    print(f"{args.out_dir}: {tokenizer.size:,} tokens, a context of {c.block_size:,}\n"
          f"next: python prepare.py --out_dir={args.out_dir} --tokenizer={new[1]}")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    exports = commands.add_parser("export", allow_abbrev=False, help="write a trained model")
    exports.add_argument("checkpoint", help="a file such as out/tiny/ppo.pt")
    exports.add_argument("to", help="a new folder, or a new file that ends in .gguf")
    exports.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                         help="of the weights; default: that of the checkpoint")
    exports.set_defaults(run=export_model)
    imports = commands.add_parser("import", allow_abbrev=False, help="read a pretrained model")
    imports.add_argument("folder", help="config.json, tokenizer.json and *.safetensors")
    imports.add_argument("--out_dir", required=True, help="the new run folder")
    imports.add_argument("--block_size", type=int, default=1024,
                         help="the longest sequence, in tokens; a long one takes memory")
    imports.set_defaults(run=import_model)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except OSError as error:  # a file that is missing, a full disk, …: it names the path
        raise SystemExit(str(error))


if __name__ == "__main__":
    main()
