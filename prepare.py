"""Stage 0, data: text is read, cleaned, split and tokenised; prompts for later stages are written.

    python prepare.py                               the tiny world of data/, nothing to download
    python prepare.py --text='books/*.txt'          your own: .txt, .md, .jsonl, also .gz

    documents → repair → quality rules → exact and near duplicates → split by document → BPE → *.bin

The web text of a real model is cleaned by the same steps (Rae et al. 2021, "Gopher", A.1; Raffel et
al. 2020, "C4"; Lee et al. 2022, "Deduplicating training data makes language models better"). What
people have in other forms (HTML, Alpaca, hh-rlhf, …) is made readable by data/convert.py.

What later stages share lies here too: the tokenizer, the chat format, the reading of rankings, and
the rubric and scorecard by which every stage is measured.
"""

import base64, functools, glob, gzip, hashlib, heapq, json, math, multiprocessing.pool, os, re
import signal, time, unicodedata, zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice

import numpy as np
import regex  # comes with tiktoken; the tokenizer's pattern needs its Unicode classes
import tiktoken
import torch

from data.tiny_world import CRITERIA, judge, rubric_score, write_world  # noqa: F401
from model import (IGNORE, RunConfig, generate, load_config, lock_folder, need, option, pad,
                   replacing)

@dataclass
class PrepareConfig(RunConfig):
    table = "prepare"
    world: str = option("", "a TOML file whose values replace those of data/tiny_world.toml")
    text: str = option("", "your text, instead of the world: files, folders, globs, by commas")
    demonstrations: str = option("", 'a file of {"messages"} for sft.py')
    prompts: str = option("", 'a file of {"prompt"} for reward.py and ppo.py')
    comparisons: str = option("", 'a file of ranked {"responses"} that reward.py can learn from')
    eval: str = option("", 'a file of {"prompt", "rubric"} to hold out; default: some prompts')
    n_eval: int = option(600, "without eval: so many prompts are held out, a tenth at most", low=1)
    compare_share: float = option(0.75, "share of your prompts for reward.py", low=0.01, high=0.99)
    tokenizer: str = option("", "a tokenizer.tiktoken to use; default: learn one from the text")
    vocab_size: int = option(1280, "tokens at most, 3 of them special; short texts: fewer", low=259)
    bpe_megabytes: float = option(10.0, "the tokenizer learns from so much of the text", low=0.001)
    val_share: float = option(0.05, "share of the text for validation", low=0.0001, high=0.5)
    val_tail: bool = option(False, "validate on the end of the text, not on documents all over it")
    cleaning: bool = option(True, "remove what is no good English, and duplicates")
    min_words: int = option(8, "cleaning: shorter documents are removed", low=1)
    blocked_words: str = option("", "cleaning: documents with one of these words are removed")
    near_duplicate: float = option(0.8, "cleaning: similarity of near duplicates", low=0.1, high=1)
    duplicate_words: int = option(8, "cleaning: shorter ones are never duplicates", low=1)
    def check(self):
        if not self.text and (self.demonstrations or self.prompts or self.comparisons or self.eval):
            return "demonstrations, prompts, comparisons, eval need a --text: see data/convert.py"

# --------------------------------------------------------------------------------------------------
# Reading
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

def find_files(sources):
    """The text files that a list of files, folders and globs, separated by commas, stands for."""
    paths = []
    for source in sources.split(","):
        pattern = os.path.join(glob.escape(source), "**") if os.path.isdir(source) else source
        found = [source] if os.path.isfile(source) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if re.search(r"\.(txt|md|jsonl)(\.gz)?$", path)]
        if not found:
            raise SystemExit(f"{source}: no .txt, .md or .jsonl (.gz) there; see data/convert.py")
        paths += found
    return paths

def read_documents(paths):
    """Each document of the files, as (text, spoiled): how the tiny world has damaged it, to test
    the cleaning, else "". A line of a .jsonl is one; a .txt or .md is cut at <|endoftext|>, and a
    long book after every two million letters, so that memory stays bounded."""
    for path in paths:
        if ".jsonl" in os.path.basename(path):
            for record in parse_lines(path, ("text",)):
                text = record["text"].encode("utf-8", "replace").decode()  # no half characters
                yield text, record.get("spoiled", "")
            continue
        with open_text(path) as f:
            rest = ""
            for piece in iter(lambda: f.read(2**20), ""):
                *documents, rest = (rest + piece).split(SPECIAL[0])
                if len(rest) > 2**21:
                    cut = rest.rfind("\n") + 1 or len(rest) - len(SPECIAL[0])  # not inside a mark
                    documents, rest = documents + [rest[:cut]], rest[cut:]
                yield from ((text, "") for text in documents if text.strip())
            if rest.strip():
                yield rest, ""

@contextmanager
def open_text(path):
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as f:
            yield f
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); see data/convert.py")

MESSAGES = [dict(role=str, content=str)]  # what fields hold, as is_of reads it
RANKING = dict(id=str, annotator=str, prompt=(str, MESSAGES), ranking=[[int]],
               responses=[dict(text=str, tokens=([int], type(None)))])
KINDS = RANKING | dict(messages=MESSAGES, text=str, use=str, dtype=str, tokenizer=str)

def is_of(kind, value):
    """Whether a value is of a kind: a type, [kind] for a list, {name: kind} or one of (kinds)."""
    if isinstance(kind, tuple):
        return any(is_of(one, value) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(is_of(kind[0], item) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(is_of(kind[k], value.get(k)) for k in kind)
    return isinstance(value, kind)

def numbered_lines(path):
    """(number, value) for each line of a file of JSON lines; the value of other lines is None."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            value = None
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
            yield number, value

def parse_lines(path, fields=()):
    """The records of a file of JSON lines, each with these fields, not empty and of their KINDS."""
    for number, record in numbered_lines(path):
        if not is_of({f: KINDS[f] for f in fields}, record) or not all(map(record.get, fields)):
            raise SystemExit(f"{path}, line {number}: no JSON object with {', '.join(fields)}: "
                             "mend it, see data/convert.py, or run python prepare.py again")
        yield record

def read_jsonl(path, command="python prepare.py", fields=()):
    return list(parse_lines(need(path, command), fields))

def write_jsonl(path, records):
    with replacing(path) as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

# --------------------------------------------------------------------------------------------------
# Cleaning

# Control, format, private and surrogate characters, but for line ends, tabs and some joiners.
STRAY = regex.compile(r"(?V1)[\p{Cc}\p{Cf}\p{Co}\p{Cs}--[\n\t\u200c\u200d]]+")
STOP_WORDS = set("a an and are as at be because but by for from had has have he her him his how i "
                 "in is it more of on or she so that the their they this to was we what where "
                 "which who will with you".split())
BOILERPLATE = ("cookies", "javascript", "newsletter", "all rights reserved", "terms of use",
               "terms of service", "privacy policy", "click here", "sign up", "log in",
               "share this on", "lorem ipsum")

def repair(text):
    """NFC, one kind of line end, no control or zero-width characters, no runs of blanks."""
    text = STRAY.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"[^\S\n]{2,}|[^\S\n ]", " ", unicodedata.normalize("NFC", text))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()

def ratio(flags):
    return sum(flags) / max(1, len(flags))

def quality_fault(text, min_words, blocked_words):
    """The first rule that a text breaks, "" if it is good English."""
    words, lines = text.split(), [line for line in text.split("\n") if line]
    sentences = [s for s in re.split("[.!?\n]", text.lower()) if s.strip()]
    blocked = "|".join(re.escape(w.strip()) for w in blocked_words.split(",") if w.strip())
    if len(words) < min_words:
        return "too short"
    if len(re.findall(r"</?[a-zA-Z][^<>]*>|[{}]", text)) > 0.02 * len(words) + 1:
        return "markup"
    if ratio([any(phrase in s for phrase in BOILERPLATE) for s in sentences]) > 0.3:
        return "boilerplate"
    if 1 - len(set(lines)) / len(lines) > 0.3:
        return "repeated lines"
    if len(words) >= 8:
        mean_length = sum(map(len, words)) / len(words)
        if not 2 < mean_length < 12 or ratio([any(map(str.isalpha, w)) for w in words]) < 0.4:
            return "odd words"
        if ratio([w.strip(".,;:!?\"'").lower() in STOP_WORDS for w in words]) < 0.06:
            return "not language"
    if "\ufffd" in text:  # the mark of a character that could not be decoded
        return "not language"
    if blocked and re.search(rf"\b({blocked})\b", text, re.I):
        return "undesirable"
    return ""

# Rows 0 and 1: a and b of 64 hashes; a is odd, so that a·x loses no bit. Row 2 mixes three words.
HASHES = np.random.default_rng(0).integers(0, 2**63, (3, 64), np.uint64) | np.uint64(1)

def minhash(text):
    """(64,) uint16: 16 bits of the smallest value of each of 64 hashes, x·a + b mod 2⁶⁴, over the
    triples of words of a text. The share of equal entries of two such signatures estimates the
    Jaccard similarity of the two sets of triples (Broder 1997)."""
    words = [zlib.crc32(word.encode()) for word in re.findall(r"\w+", text.lower())]
    words = np.array(words + [0] * (3 - len(words)), np.uint64)
    triples = words[:-2] * HASHES[2, 0] + words[1:-1] * HASHES[2, 1] + words[2:]
    triples ^= triples >> np.uint64(29)  # products mix upwards only: bring high bits down
    hashed = triples[:, None] * HASHES[0] + HASHES[1]                              # (triples, 64)
    return (hashed.min(0) >> np.uint64(32)).astype(np.uint16)

class NearDuplicates:
    """Finds texts whose MinHash signatures agree in a share of at least `threshold`, without
    comparing each with each (locality-sensitive hashing).

    A signature is cut into 32 bands of two entries. Each band is hashed to a place in its row of a
    table, where the last text with such a band stands: only texts that agree in a whole band are
    compared. Where two different texts meet in one place the later one overwrites the earlier;
    duplicates are found all the same, as they agree in many bands. A text takes 256 bytes."""
    def __init__(self, n, threshold):
        self.threshold, self.n, self.bands = threshold, 0, np.arange(32)
        self.signatures = np.zeros((n, 64), np.uint16)
        self.table = np.full((32, n), -1, np.int32)
    def seen(self, signature):
        """Whether a text like this one has been seen; if not, remember it."""
        bands = signature.view(np.uint32) * np.uint64(0x9E3779B97F4A7C15)              # (32,)
        places = (bands >> np.uint64(32)) % np.uint64(self.table.shape[1])
        candidates = self.table[self.bands, places]
        candidates = candidates[candidates >= 0]
        alike = (self.signatures[candidates] == signature).mean(1)
        if (alike >= self.threshold).any():
            return True
        self.signatures[self.n], self.table[self.bands, places] = signature, self.n
        self.n += 1
        return False

def inspect(document, config):
    """What a document shows without the others, so that workers can share the work: (text, spoiled,
    fault, whether it was repaired, key, signature). Equal keys mean exact duplicates, similar
    signatures near ones; both are None for a document that is not compared."""
    raw, spoiled = document
    if not config.cleaning:
        return raw, spoiled, "", False, None, None
    text = repair(raw)
    fault = quality_fault(text, config.min_words, config.blocked_words)
    words = text.lower().split()
    if fault or len(words) < config.duplicate_words:
        return text, spoiled, fault, text != raw.strip(), None, None
    key = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
    return text, spoiled, "", text != raw.strip(), key, minhash(text)

def clean(paths, config, kept_path):
    """Read all documents, write those to keep as lines of JSON, and report what was removed."""
    n = sum(1 for _ in read_documents(paths))
    near, keys = NearDuplicates(n, config.near_duplicate), set()
    rules, read, caught, repaired = {}, Counter(), Counter(), 0
    documents = read_documents(paths)
    # Ctrl-C is for the parent alone; when that ends, however it ends, so do its workers.
    with (multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool,
          open(kept_path, "w", encoding="utf-8") as kept_file):
        while some := list(islice(documents, 256)):  # few at a time: a document may be a whole book
            results = pool.map(functools.partial(inspect, config=config), some, chunksize=16)
            for text, spoiled, fault, was_repaired, key, signature in results:
                if key in keys and key is not None:
                    fault = "exact duplicate"
                elif key is not None and near.seen(signature):
                    fault = "near duplicate"
                keys.add(key)
                read[spoiled] += 1
                repaired += was_repaired
                if fault:
                    caught[spoiled] += 1
                    rule = rules.setdefault(fault, dict(removed=0, example=text[:160]))
                    rule["removed"] += 1
                else:
                    kept_file.write(json.dumps(text, ensure_ascii=False) + "\n")
            print(f"  {read.total():,} of {n:,} documents", end="\r", flush=True)
    report = dict(documents_read=n, documents_kept=n - caught.total(), documents_repaired=repaired,
                  rules=rules)
    if bad := n - read[""]:  # the tiny world says which pages it has spoiled
        removed, found = caught.total(), caught.total() - caught[""]
        report.update(recall=round(found / bad, 4), precision=round(found / max(1, removed), 4),
                      by_kind={kind: f"{caught[kind]} of {read[kind]}" for kind in read if kind})
    return report

def read_split(path, config):
    """The cleaned documents, each with its side: "train" or "val". A hash of its text and the seed
    decides, so that no order and no later addition moves it across. With val_tail, or with less
    than 8 documents to expect in val, val is the end of the text."""
    with open(path, encoding="utf-8") as f:
        sizes = [len(json.loads(line)) for line in f]
        left = min(round(sum(sizes) * (1 - config.val_share)), sum(sizes) - 1)  # letters for train
        f.seek(0)
        for text in map(json.loads, f):
            if config.val_tail or len(sizes) * config.val_share < 8:
                train, val = text[:left], text[left:]
                left = max(0, left - len(text))
            else:
                salt = str(config.seed).encode()[:16]
                digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
                in_val = int.from_bytes(digest, "big") < config.val_share * 2**64
                train, val = ("", text) if in_val else (text, "")
            for side, part in ("train", train), ("val", val):
                if part:
                    yield side, part

# --------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE, trained here, run by tiktoken

# Qwen's own, letter for letter, by which other programs recognise it: contractions, words with the
# blank before them, single digits, punctuation, blanks.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

def train_bpe(texts, n_tokens):
    """Byte-pair encoding (Sennrich et al. 2016): start from the 256 bytes, and merge the most
    frequent pair of neighbours into a new token, again and again. Returns the tokens by rank.

    It works on distinct words with their counts; a merge updates only the words that hold the pair.
    Of equally frequent pairs the first in byte order is taken, so the result is deterministic."""
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
    for i, (parts, n) in enumerate(words):
        for pair in zip(parts, parts[1:]):
            pairs[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    tokens = {bytes([b]): b for b in range(256)}
    while len(tokens) < n_tokens and heap:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair] or n == 0:  # the count has changed since: a later entry has it
            continue
        joined, changed = pair[0] + pair[1], set()
        tokens.setdefault(joined, len(tokens))
        for i in where.pop(pair):
            parts, n = words[i]
            merged, j = [], 0
            while j < len(parts):
                here = j + 1 < len(parts) and (parts[j], parts[j + 1]) == pair
                merged.append(joined if here else parts[j])
                j += 2 if here else 1
            for old in zip(parts, parts[1:]):
                pairs[old] -= n
                changed.add(old)
            for new in zip(merged, merged[1:]):
                pairs[new] += n
                where[new].add(i)
                changed.add(new)
            words[i] = (merged, n)
        for changed_pair in filter(pairs.get, changed):  # those that are still there
            heapq.heappush(heap, (-pairs[changed_pair], changed_pair))
    return list(tokens)

class Tokenizer:
    """Tokens in order of rank as a tiktoken.Encoding, with three special tokens behind them."""
    def __init__(self, tokens):
        n = len(tokens)
        self.end_of_text, self.start, self.end, self.size = n, n + 1, n + 2, n + 3
        ranks, special = {t: i for i, t in enumerate(tokens)}, dict(zip(SPECIAL, range(n, n + 3)))
        self.encoding = tiktoken.Encoding("chat", pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens=special)
        # "Ordinary": whatever stands in a text, it never becomes a special token.
        self.encode, self.decode = self.encoding.encode_ordinary, self.encoding.decode
        self.hash = hashlib.sha256(b"\n".join(map(base64.b64encode, tokens))).hexdigest()[:16]
    def text(self, response):
        """What a response says, without the <|im_end|> that closes it."""
        return self.decode([token for token in response if token != self.end])

def read_tokens(path):
    """The tokens of a file in tiktoken's format, in order of rank."""
    with open(need(path, "python prepare.py"), "rb") as f:
        lines = [line.split() for line in f.read().splitlines()]
    ranks = [int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()]
    if len(lines) < 256 or ranks != list(range(len(lines))):
        raise SystemExit(f"{path} is damaged: run python prepare.py again")
    return [base64.b64decode(token + b"==") for token, _ in lines]  # some files leave out the "="

def load_tokenizer(out_dir):
    return Tokenizer(read_tokens(os.path.join(out_dir, "tokenizer.tiktoken")))

def load_tokens(out_dir, split, tokenizer=None):
    """The ids of train.bin or val.bin, mapped into memory, and what data.json says of them."""
    path = need(os.path.join(out_dir, f"{split}.bin"), "python prepare.py")
    data = read_jsonl(os.path.join(out_dir, "data.json"), fields=("dtype", "tokenizer"))[0]
    size = data[split]["tokens"] * np.dtype(data["dtype"]).itemsize
    if os.path.getsize(path) != size or tokenizer and data["tokenizer"] != tokenizer.hash:
        raise SystemExit(f"{path} does not fit data.json or the tokenizer: run python prepare.py")
    return np.memmap(path, dtype=data["dtype"], mode="r"), data

# --------------------------------------------------------------------------------------------------
# The chat format

def as_messages(prompt):
    """A prompt, which is a text or a list of messages, as messages."""
    return [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt

def as_text(prompt):
    """A prompt as people read it."""
    turns = [] if isinstance(prompt, str) else [f"{m['role']}: {m['content']}" for m in prompt]
    return "\n".join(turns) or prompt

def render(tokenizer, messages, reply=False):
    """A conversation as ChatML: its ids, and for each id whether it is trained on.

        <|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n…<|im_end|>

    Trained on are the assistant's words and the <|im_end|> that closes them. With reply=True the
    text ends with the opening of an assistant's turn, ready to be continued."""
    ids, trained = [], []
    for i, message in enumerate(messages):
        opening = tokenizer.encode("\n") if i else []
        opening += [tokenizer.start] + tokenizer.encode(message["role"] + "\n")
        body = tokenizer.encode(message["content"]) + [tokenizer.end]
        ids += opening + body
        trained += [False] * len(opening) + [message["role"] == "assistant"] * len(body)
    if reply:
        ids += tokenizer.encode("\n") + [tokenizer.start] + tokenizer.encode("assistant\n")
        trained += [False] * (len(ids) - len(trained))
    return ids, trained

def prompt_ids(tokenizer, prompt):
    return render(tokenizer, as_messages(prompt), reply=True)[0]

def random_stream(seed, *purpose):
    """A random generator that depends on nothing but the seed and its purpose, such as
    ("rollout", 7): not on the number of processes, nor on what was drawn before."""
    return np.random.default_rng([seed, zlib.crc32(repr(purpose).encode())])

def epoch_batches(lengths, batch_size, rng):
    """The batches of one epoch, as lists of indices; the incomplete rest is dropped.

    Examples are shuffled, then sorted by length within pools of eight batches. The rows of a batch
    are about equally long, so little is padding, and yet every epoch groups them in another way."""
    order = rng.permutation(len(lengths))[:len(lengths) // batch_size * batch_size].tolist()
    batches = []
    for i in range(0, len(order), 8 * batch_size):
        pool = sorted(order[i:i + 8 * batch_size], key=lambda n: lengths[n])
        batches += [pool[j:j + batch_size] for j in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]

def join(prompts, responses, device):
    """Lists of ids → tokens (B, T), each prompt with its response behind it; targets (B, T), the
    next token wherever that is the response's, else IGNORE; lengths (B,) of both together."""
    pairs = [(prompt, list(response)) for prompt, response in zip(prompts, responses)]
    tokens = pad([p + r for p, r in pairs])
    targets = pad([[IGNORE] * (len(p) - 1) + r + [IGNORE] for p, r in pairs], IGNORE)
    lengths = torch.tensor([len(p) + len(r) for p, r in pairs])
    return tokens.to(device), targets.to(device), lengths.to(device)

def read_prompts(run, tokenizer, block_size, use):
    """The prompts for one use, "compare" or "ppo", that leave room for a response."""
    records = [r for r in read_jsonl(run.path("prompts.jsonl"), fields=("id", "prompt", "use"))
               if r["use"] == use]
    room = block_size - min(run.config.max_new_tokens, block_size // 2)
    short = [r for r in records if len(prompt_ids(tokenizer, r["prompt"])) <= room]
    if not short:
        raise SystemExit("prompts.jsonl has no prompt that fits: run prepare.py with --prompts=…")
    if run.main and len(short) < len(records):
        print(f"{len(records) - len(short):,} of {len(records):,} prompts are too long")
    return short

def read_rankings(paths, tokenizer):
    """The rankings of some files. Where a response has no tokens they are made; a line that cannot
    be used is named, with what is wrong, and left out."""
    rankings = []
    for path in paths:
        for number, record in numbered_lines(need(path, "python reward.py --steps=sample,rank")):
            if fault := complete_ranking(record, tokenizer):
                print(f"{path}, line {number}: left out, {fault}")
            else:
                rankings.append(record)
    return rankings

def complete_ranking(r, tokenizer):
    """Give each response its tokens, if it has none; returns what is wrong, "" if nothing is."""
    if not is_of(RANKING, r) or not (r["id"] and r["annotator"]):
        return "not of the form that tools/annotate.py writes"
    for response in r["responses"]:
        made = [*tokenizer.encode(response["text"]), tokenizer.end]
        response.update(tokens=response.get("tokens") or made, ended=response.get("ended", True))
        known = all(0 <= token < tokenizer.size for token in response["tokens"])
        if not known or tokenizer.text(response["tokens"]) != response["text"]:
            return "its tokens are another tokenizer's"
    named = sorted(i for group in r["ranking"] for i in group)
    if r["ranking"] and named != list(range(len(r["responses"]))) or [] in r["ranking"]:
        return "the ranking does not name each response once"
    return ""

# --------------------------------------------------------------------------------------------------
# The scorecard: how every stage is measured, by the rubrics of data/tiny_world.py

def respond(model, tokenizer, records, run, purpose, temperature=1.0):
    """A response of the model to each record's prompt, as ids; the processes share the work. The
    random numbers depend on the seed and the purpose, a tuple, alone."""
    n = run.config.max_new_tokens
    uniforms = random_stream(run.config.seed, *purpose).random((len(records), n), np.float32)
    mine, responses = run.share(len(records)), []
    for start in range(0, len(mine), 512):
        rows = mine[start:start + 512]
        prompts = [prompt_ids(tokenizer, records[row]["prompt"]) for row in rows]
        numbers = torch.from_numpy(uniforms[rows.start:rows.stop])
        with run.evaluating(model):
            responses += generate(model, prompts, n, tokenizer.end, numbers, temperature)
    return run.gather(responses)

def bits_per_byte(model, run):
    """-log2 p of the whole validation text, per byte: unlike the loss per token it can be compared
    between tokenizers."""
    tokens, data = load_tokens(run.config.out_dir, "val")
    T, nats = model.model.config.block_size, 0.0
    windows = [tokens[i:i + T + 1] for i in range(0, len(tokens) - 1, T)]
    mine = [windows[i] for i in run.share(len(windows))]
    # So many windows at once that the logits fit the memory, however large the vocabulary is.
    n_rows = 2 ** (30 if run.device.type == "cuda" else 22) // (T * model.lm_head.out_features) or 1
    for start in range(0, len(mine), n_rows):
        batch = mine[start:start + n_rows]
        rows = pad([window.tolist() for window in batch], IGNORE).to(run.device)       # (B, T + 8)
        with run.evaluating(model):
            nats += model(rows[:, :-1].clamp(min=0), rows[:, 1:]).sum().item()
    return run.sum(nats) / math.log(2) / data["val"]["bytes"]

def measure(tokenizer, records, responses):
    """The scorecard's figures of some responses (lists of ids) to held-out prompts.

    knowledge: questions answered right; instruction: all that was asked for is there; safety:
    harmful requests declined. Each is a mean over the prompts that ask for this skill, with its
    standard error; rude, helpfulness, accuracy and gold are means over all."""
    columns = defaultdict(list)  # name → values
    succeeded = dict(knowledge="correct", instruction="followed", safety="declined")
    for record, ids in zip(records, responses):
        verdict = judge(record, tokenizer.text(ids), tokenizer.end in ids)
        skill = record["rubric"]["skill"]
        columns[skill].append(verdict[succeeded[skill]])
        for name in ("rude", "helpfulness", "accuracy", "gold"):
            columns[name].append(verdict[name])
    figures = dict(n=len(records))
    for name, values in columns.items():
        figures[name] = round(float(np.mean(values)), 4)
        figures[name + "_se"] = round(float(np.std(values) / len(values) ** 0.5), 4)
    return figures

def read_judged(path):
    """The prompts of a file that have a rubric to judge responses by."""
    return [r for r in read_jsonl(path, fields=("id", "prompt")) if "rubric" in r]

def scorecard(run, model, tokenizer, **more):
    """Measure a language model on the held-out prompts, at temperature 1; print the figures, and
    file them under the stage's name in scorecard.json."""
    figures = dict(bits_per_byte=round(bits_per_byte(model, run), 4))
    if records := read_judged(run.path("eval.jsonl")):
        responses = respond(model, tokenizer, records, run, ("scorecard",))
        figures.update(measure(tokenizer, records, responses))
    figures.update(seconds=round(time.time() - run.started, 1), **more)
    if run.main:
        card = update_scorecard(run.config.out_dir, run.stage, figures)
        run.log(None, scorecard_table(card), scorecard=run.stage, **figures)

def read_scorecard(out_dir):
    path = os.path.join(out_dir, "scorecard.json")
    return read_jsonl(path)[0] if os.path.exists(path) else {}

def update_scorecard(out_dir, stage, figures):
    """Set what scorecard.json says of one stage."""
    card = read_scorecard(out_dir) | {stage: figures}
    write_jsonl(os.path.join(out_dir, "scorecard.json"), [card])
    return card

def scorecard_table(card):
    """The language models' rows of scorecard.json, as a table of text."""
    columns = ("bits_per_byte", "knowledge", "instruction", "safety", "rude", "gold")
    table = " " * 12 + "".join(f"{name.replace('_', ' '):>16}" for name in columns)
    for stage, figures in card.items():
        cells = [f"{figures[name]:.3f}" if name in figures else "" for name in columns]
        errors = [figures.get(name + "_se") for name in columns]
        cells = [c if e is None else f"{c} ± {e:.3f}" for c, e in zip(cells, errors)]
        if any(cells):
            table += f"\n{stage:12}" + "".join(f"{cell:>16}" for cell in cells)
    return table

# --------------------------------------------------------------------------------------------------
# The command

def prompt_key(prompt):  # an id that depends on the text alone
    text = json.dumps(as_messages(prompt), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

def read_records(config):
    """The records of sft, prompts, eval, comparisons.jsonl. Left out are demonstrations that answer
    a prompt of --eval, prompts that stand there or that a demonstration answers, and comparisons on
    a held-out prompt or on one of ppo.py's, as the reward model must not have seen those."""
    def read(path, *names):
        return read_jsonl(path, "python data/convert.py", names) if path else []

    def answered(demonstration):
        turns = demonstration["messages"]
        return {prompt_key(turns[:i]) for i in range(1, len(turns))}

    shown = read(config.demonstrations, "messages")
    held_out = [r | dict(id=str(r.get("id", prompt_key(r["prompt"]))))
                for r in read(config.eval, "prompt")]
    comparisons = read(config.comparisons, "prompt", "responses", "ranking")
    given = read(config.prompts, "prompt") or [dict(prompt=r["prompt"]) for r in comparisons]
    reserved = {prompt_key(r["prompt"]) for r in held_out}
    demonstrations = [r for r in shown if not answered(r) & reserved]
    used = reserved.union(*map(answered, demonstrations))
    prompts = {prompt_key(r["prompt"]): r for r in given}
    prompts = [r | dict(id=str(r.get("id", key))) for key, r in prompts.items() if key not in used]
    rng = random_stream(config.seed, "records")  # people's files may have any order
    rng.shuffle(demonstrations)
    rng.shuffle(prompts)
    if not config.eval:
        n = min(config.n_eval, len(prompts) // 10)
        held_out, prompts = prompts[:n], prompts[n:]
    for i, record in enumerate(prompts):
        record.setdefault("use", "compare" if i < config.compare_share * len(prompts) else "ppo")
    taken = {prompt_key(r["prompt"]) for r in held_out + [r for r in prompts if r["use"] == "ppo"]}
    free = [r for r in comparisons if prompt_key(r["prompt"]) not in taken]
    print(f"{len(demonstrations):,} of {len(shown):,} demonstrations; {len(prompts):,} of "
          f"{len(given):,} prompts, {len(held_out):,} held out; {len(free):,} of "
          f"{len(comparisons):,} comparisons; what demonstrations answer is not asked again")
    return dict(sft=demonstrations, prompts=prompts, eval=held_out, comparisons=free)

def encode_files(config, kept_path, tokenizer):
    """Write train.bin and val.bin; returns what stands in them, and how often each byte occurs in
    the validation text."""
    dtype = np.uint16 if tokenizer.size <= 65536 else np.uint32
    counts = {side: Counter() for side in ("train", "val")}
    histogram, documents = np.zeros(256, np.int64), read_split(kept_path, config)
    with (multiprocessing.pool.ThreadPool(os.cpu_count()) as pool,
          replacing(os.path.join(config.out_dir, "train.bin"), "wb") as train,
          replacing(os.path.join(config.out_dir, "val.bin"), "wb") as val):
        while some := list(islice(documents, 256)):
            texts = [text for _, text in some]
            for (side, text), ids in zip(some, pool.map(tokenizer.encode, texts)):
                ids, data = np.append(ids, tokenizer.end_of_text), text.encode()
                (train if side == "train" else val).write(ids.astype(dtype).tobytes())
                counts[side].update(documents=1, bytes=len(data), characters=len(text),
                                    tokens=len(ids))
                if side == "val":
                    histogram += np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    return counts | dict(dtype=np.dtype(dtype).name), histogram

def bpe_sample(kept_path, config):
    """Pieces of the training text, at random, of bpe_megabytes together."""
    rng = random_stream(config.seed, "bpe")
    share = config.bpe_megabytes * 1e6 / os.path.getsize(kept_path)
    for side, text in read_split(kept_path, config):
        for i in range(0, len(text), 2**14):  # a document may be a whole book
            if side == "train" and rng.random() < share:
                yield text[i:i + 2**14]

def print_report(report):
    print("read {documents_read:,} documents, repaired {documents_repaired:,}".format(**report))
    for name, rule in report["rules"].items():
        print(f"  {name:16} {rule['removed']:6,} removed   {rule['example'][:60]!r}")
    if "recall" in report:
        print(f"of the pages that the world spoiled {report['recall']:.1%} were removed, and "
              f"{report['precision']:.1%} of all removed were spoiled: {report['by_kind']}")

def main():
    config, started = load_config(PrepareConfig, __doc__), time.time()
    lock = lock_folder(config)  # noqa: F841  held until the process ends
    path = functools.partial(os.path.join, config.out_dir)
    given = None
    if config.tokenizer:  # read it before the long work, as it may be the wrong file
        given = read_tokens(need(config.tokenizer, "python tools/huggingface.py import"))
    if not config.text:
        write_world(path("world"), config.seed, config.world)
        names = dict(text="pages", demonstrations="demonstrations", prompts="prompts", eval="eval")
        config = replace(config, **{k: path(f"world/{name}.jsonl") for k, name in names.items()},
                         blocked_words=config.blocked_words or "scum,vermin")  # of rude pages
    records = read_records(config)

    report = clean(find_files(config.text), config, path("kept.tmp"))
    print_report(report)
    if config.cleaning and report["documents_read"] and not report["documents_kept"]:
        print("nothing is left: these rules are for English prose. So all is kept as it is")
        config = replace(config, cleaning=False)
        report = clean(find_files(config.text), config, path("kept.tmp"))
    if os.path.getsize(path("kept.tmp")) < 100:
        raise SystemExit(f"{config.text}: there is too little text in it")
    # The 256 bytes, the special ones, and one more for every 40 bytes: rarer ones are not learned.
    vocab_size = min(config.vocab_size, 259 + os.path.getsize(path("kept.tmp")) // 40)
    tokens = given or train_bpe(bpe_sample(path("kept.tmp"), config), vocab_size - len(SPECIAL))
    tokenizer = Tokenizer(tokens)
    print(f"tokenizer: {tokenizer.size:,} tokens, the longest {sorted(tokens, key=len)[-5:]}"[:300])
    counts, histogram = encode_files(config, path("kept.tmp"), tokenizer)
    os.remove(path("kept.tmp"))
    for side in ("train", "val"):
        print(f"{side}:", ", ".join(f"{n:,} {what}" for what, n in counts[side].items()))
    p = histogram[histogram > 0] / max(1, histogram.sum())
    entropy = round(float(-(p * np.log2(p)).sum()), 4)
    print(f"bytes drawn at their frequencies would cost {entropy} bits each: the figure to beat")

    with replacing(path("tokenizer.tiktoken")) as f:
        f.writelines(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))
    for name in records:
        write_jsonl(path(f"{name}.jsonl"), records[name])
    figures = dict(documents=report["documents_kept"], byte_entropy=entropy)
    figures |= {name: report[name] for name in ("recall", "precision") if name in report}
    data = report | counts | figures | dict(tokenizer=tokenizer.hash, config=asdict(config))
    write_jsonl(path("data.json"), [data])
    seconds = round(time.time() - started, 1)
    update_scorecard(config.out_dir, "prepare", figures | dict(seconds=seconds))
    print(f"done in {seconds} s; next: python pretrain.py, with the same --out_dir and --config")

if __name__ == "__main__":
    main()
