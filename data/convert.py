"""What people have becomes what prepare.py reads: text, demonstrations, comparisons and prompts, in
whatever form, encoding or packing they come, are written as plain records, one a line.

    python data/convert.py FILE… --as=text|demonstrations|comparisons|prompts --to=NEW.jsonl

    text             {"text"}
    demonstrations   {"messages": [{"role", "content"}, …]}, the last one the assistant's
    comparisons      {"id", "prompt", "responses": [{"text"}, …], "ranking", "annotator"}
    prompts          {"id", "prompt"}

FILE is a file, a folder, a pattern such as 'books/*.txt', or a URL. Text is read from .txt, .md and
.html files; records, and text in one of their fields, from .json, .jsonl, .csv, .tsv and .parquet
files. All may be packed by gzip, xz, bzip2 or zip. The forms of records that are known are listed
below, each with the fields that tell it. Of conversations --as=text takes all that is said, and of
comparisons --as=demonstrations the best reply. A tree of messages becomes several records. What
cannot be used is counted and named, and more than one unreadable record in twenty of a file is an
error.
"""

import argparse
import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import hashlib
import html.parser
import io
import itertools
import json
import lzma
import math
import os
import re
import sys
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import charset_normalizer  # comes with tiktoken, as requests does
import requests


class Unusable(ValueError):
    """A record that a rule leaves out, such as one with two equal replies."""


class Malformed(Unusable):
    """A record that is damaged or of no known form: many of them mean that the file is wrong."""


@dataclass
class Report:
    """What is told about one file. `place` is where in it the reader is."""
    path: str
    place: str = "line 1"
    records: int = 0
    taken: int = 0
    bad: int = 0
    first_bad: str = ""
    forms: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)  # fields that the form does not read
    remarks: Counter = field(default_factory=Counter)
    places: dict = field(default_factory=lambda: defaultdict(list))  # the first of each remark

    def remark(self, what):
        self.remarks[what] += 1
        if self.remarks[what] <= 3:
            self.places[what].append(self.place)

    def leave_out(self, fault):
        self.remark(f"left out: {fault}")
        if isinstance(fault, Malformed):
            self.bad += 1
            self.first_bad = self.first_bad or f"{self.place}: {fault}"

    @contextlib.contextmanager
    def leaving_out_faults(self):
        try:
            yield
        except Unusable as fault:
            self.leave_out(fault)
        except RecursionError:
            self.leave_out(Malformed("nested too deeply"))

    def show(self):
        forms = ", ".join(self.forms) or "no known form"
        print(f"{self.path}: {forms}; {self.records:,} records, {self.taken:,} written")
        for what, n in self.remarks.most_common(20):
            print(f"    {what}: {n:,} ({'; '.join(self.places[what])}{'; …' if n > 3 else ''})")
        if self.unused:
            print("    fields not used:", ", ".join(f"{k} ({n:,})" for k, n in self.unused.items()))


# --------------------------------------------------------------------------------------------------
# Files: found, downloaded, unpacked, decoded

RECORDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
PAGES = (".html", ".htm")
TEXTS = (".txt", ".md", *PAGES)


def zipped_name(archive):
    """The name of the one file in a zip archive."""
    names = [name for name in archive.namelist()
             if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise OSError(f"it is a zip archive of {len(names):,} files; unpack it, and name its files")
    return names[0]


def open_zip(f):
    archive = zipfile.ZipFile(f)
    try:
        return archive.open(zipped_name(archive))
    except RuntimeError as error:  # it needs a password, or an unknown method has packed it
        raise OSError(error)


PACKED = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open,
          b"PK\3\4": open_zip, b"PK\5\6": open_zip}
FORMATS = {b"%PDF": "a PDF", b"\x28\xb5\x2f\xfd": "packed by zstd", b"7z\xbc\xaf": "a 7z archive",
           b"Rar!": "a rar archive"}


def kind_of(path):
    """The suffix that says what a file holds: ".txt" of "Emma.TXT.gz"."""
    name = re.sub(r"\.(gz|xz|bz2|zip)$", "", path.lower())
    if path.lower().endswith(".zip"):  # the name of what is packed says more
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            name = zipped_name(archive).lower()
    return os.path.splitext(name)[1]


def find_files(sources, kinds, downloads):
    """The files that a list of sources means: files, folders, globs and URLs. Of a folder or a glob
    they are those of the given kinds; a file that is named itself may be called anything."""
    paths = []
    for source in sources:
        if re.match("https?://", source, re.IGNORECASE):
            paths.append(download(source, downloads))
        elif os.path.isfile(source):
            paths.append(source)
        else:
            pattern = os.path.join(glob.escape(source), "**") if os.path.isdir(source) else source
            found = [path for path in sorted(glob.glob(pattern, recursive=True))
                     if os.path.isfile(path)]
            known = [path for path in found if kind_of(path) in kinds]
            if not known:
                raise SystemExit(f"{source} matches no file ({' '.join(kinds)})")
            if len(known) < len(found):
                print(f"{source}: {len(found) - len(known):,} files of other kinds left out")
            paths += known
    return paths


def download(url, folder):
    """Fetch a URL into a folder, unless it is there, and return its path. A download that broke off
    continues where it stopped; the file gets its name only when it is whole and has the SHA-256
    that may stand behind the URL as #sha256=…

    Beside a part lies what the server calls that version of the file, its ETag or its date. If the
    server has another version by now, it sends the whole file instead of the rest."""
    url, _, fragment = url.partition("#")
    algorithm, _, digest = fragment.lower().partition("=")
    if algorithm in ("md5", "sha1", "sha512") or algorithm == "sha256" and len(digest) != 64:
        raise SystemExit(f"{url}: #{fragment} cannot be checked; give #sha256= and 64 digits")
    digest = digest if algorithm == "sha256" else ""
    name = re.sub(r"[^\w.-]", "_", os.path.basename(url.partition("?")[0]))[-99:] or "index.html"
    path = os.path.join(folder, f"{hashlib.sha256(url.encode()).hexdigest()[:6]}-{name}")
    part, version = path + ".part", path + ".part.version"
    if os.path.exists(path):
        return check_digest(path, url, digest)
    headers = {"Accept-Encoding": "identity"}  # else a range would count packed bytes
    done = os.path.getsize(part) if os.path.exists(part) else 0
    if done:
        headers["Range"] = f"bytes={done}-"
        if os.path.exists(version):
            with open(version, encoding="utf-8") as f:
                headers["If-Range"] = f.read()
    try:
        os.makedirs(folder, exist_ok=True)
        with requests.get(url, headers=headers, stream=True, timeout=60) as response:
            if response.status_code == 416:  # there is no more than the part
                if not response.headers.get("Content-Range", "").endswith(f"/{done}"):
                    os.remove(part)
                    raise OSError("what was there is no part of this file, and was removed")
            else:
                response.raise_for_status()
                receive(response, part, version, done if response.status_code == 206 else 0)
    except (OSError, ValueError) as error:  # one of these is the base of each of requests' errors
        raise SystemExit(f"{url}: {' '.join(str(error).split())}; check the address, or run the "
                         "same command again: it continues where it stopped")
    os.replace(check_digest(part, url, digest), path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(version)
    return path


def receive(response, part, version, done):
    """Write what the server sends behind the first `done` bytes of the part."""
    total = done + int(response.headers.get("Content-Length") or 0)
    tag = response.headers.get("ETag", "W/")
    if tag.startswith("W/"):  # a weak tag does not promise the same bytes
        tag = response.headers.get("Last-Modified")
    with open(part, "ab" if done else "wb") as f:
        if tag:
            with open(version, "w", encoding="utf-8") as v:
                v.write(tag)
        for block in response.iter_content(2**16):  # a block that breaks off is lost
            f.write(block)
            done += len(block)
            if done % 2**20 < len(block) or done == total:
                print(f"\r  {done / 1e6:.1f} of {total / 1e6:.1f} MB ", end="", flush=True)
    print()
    if done < total:
        raise OSError(f"broke off after {done} of {total} bytes")


def check_digest(path, url, digest):
    """The path, if no SHA-256 is asked for or the file has it; otherwise the file is removed."""
    if digest:
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != digest:
            os.remove(path)
            raise SystemExit(f"{url}: its SHA-256 is {found}, not {digest}; the file was not kept")
    return path


@contextlib.contextmanager
def unpacked(path):
    """The bytes of a file. That it is packed is seen by its content, whatever its name is."""
    try:
        with contextlib.ExitStack() as stack:
            f = stack.enter_context(open(path, "rb"))
            head = f.peek(6)
            for magic, opener in PACKED.items():
                if head.startswith(magic):
                    f = stack.enter_context(opener(f))
            yield f
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path} cannot be read: {error}")


def declared_encoding(head):
    """The encoding that the beginning of a file declares and can be in, or None."""
    declared = re.search(rb"(?:charset|encoding)\s*[:=]\s*[\"']?([\w.-]+)", head)
    if not declared:
        return None
    try:
        name = declared[1].decode()
        b"a".decode(name)  # a LookupError unless it is an encoding of text
        codecs.getincrementaldecoder(name)().decode(head)  # its last character may be cut off
    except (LookupError, UnicodeError):
        return None
    return None if re.match("utf|ascii|iso8859-1$", codecs.lookup(name).name) else name


# Encodings of scripts that are mostly bytes above 127: among these a guess is reliable.
SCRIPTS = ["cp1251", "koi8_r", "cp1253", "cp932", "euc_jp", "gb18030", "big5", "cp949"]


def encoding_of(head):
    """The encoding of a file that begins with these bytes; None if it is not text."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    control = re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head)
    if len(control) > 4 + len(head) / 20:
        return None
    # A byte that is not UTF-8 becomes half a character; the last character may be cut off.
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head)
    damaged = len(re.findall("[\udc80-\udcff]", text))
    accented = len(re.findall("[^\x00-\x7f]", text)) - damaged
    declared = declared_encoding(head)
    if declared and (damaged or declared.lower().startswith("iso-2022")):
        return declared
    if 3 * damaged <= accented:
        return "utf-8-sig"
    if damaged > max(80, len(re.findall(b"[A-Za-z]", head))):
        guess = charset_normalizer.from_bytes(head, cp_isolation=SCRIPTS).best()
        if guess:
            return guess.encoding
    return "cp1252"  # Latin-1 with quotes and dashes in the place of control characters


@contextlib.contextmanager
def open_text(path, report):
    """A file as text, whatever its encoding; its lines end with "\\n"."""
    def stray(error):
        """In a file of UTF-8, one byte that is not is Latin-1; several are a damaged character."""
        report.remark("bytes that are not UTF-8 near here, read as Latin-1 or \ufffd")
        damaged = error.object[error.start:error.end]
        return damaged.decode("cp1252", "replace") if len(damaged) == 1 else "\ufffd", error.end

    codecs.register_error("stray", stray)
    with unpacked(path) as f:
        head = f.read(2**16)
    encoding = encoding_of(head)
    kinds = [kind for magic, kind in FORMATS.items() if head.startswith(magic)]
    if head[257:262] == b"ustar":
        kinds.append("a tar archive")
    if kinds or encoding is None:
        kind = (kinds or ["a binary file"])[0]
        raise SystemExit(f"{path} is {kind}, not text: unpack it, or save it as text, first")
    if encoding not in ("utf-8-sig", "utf-16"):
        report.remark(f"not UTF-8, read as {encoding}")
    with unpacked(path) as f:
        yield io.TextIOWrapper(f, encoding, "stray" if encoding == "utf-8-sig" else "replace")


# --------------------------------------------------------------------------------------------------
# Text: documents and pages

# How a page begins, whatever its name is: perhaps with comments and <?xml …?>. The possessive "*+"
# keeps the search linear.
HTML_PAGE = re.compile(r"(?:\s|<!--.*?-->|<\?.*?\?>)*+<(!doctype\s+)?html", re.I | re.S)


class HTMLText(html.parser.HTMLParser):
    """What a page of HTML says: `text`, without markup and scripts, a line for each block."""
    SILENT = ("script", "style", "title", "noscript", "template", "svg")
    INLINE = ("a", "abbr", "b", "cite", "code", "em", "font", "i", "mark", "q", "s", "small",
              "span", "strong", "sub", "sup", "tt", "u")

    def __init__(self, page):
        super().__init__()
        self.parts, self.silent = [], []
        self.feed(page)
        self.close()
        lines = (line.strip() for line in "".join(self.parts).split("\n"))
        self.text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    def handle_starttag(self, tag, attributes):
        if tag not in self.INLINE:
            self.parts.append("\n")
        if tag in self.SILENT:
            self.silent.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.INLINE:
            self.parts.append("\n")
        if tag in self.silent:
            self.silent.remove(tag)

    def handle_data(self, data):
        if not self.silent:
            self.parts.append(re.sub(r"\s+", " ", data))


def cut_documents(pieces, separator, longest=2**21):
    """Text in pieces → documents, which end at a separator or, if that is empty, at blank lines;
    and in any case after `longest` characters, so that a book of any length fits into memory."""
    rest = ""
    for piece in pieces:
        rest += piece
        *whole, rest = rest.split(separator) if separator else re.split(r"(?m)^\s*\n", rest)
        yield from whole
        if len(rest) > longest:
            end = rest.rfind("\n") + 1 or len(rest) - len(separator)  # it may end in half of one
            yield rest[:end]
            rest = rest[end:]
    yield rest


def read_documents(path, options, report):
    """The text records of a file of text or a page of HTML."""
    with open_text(path, report) as f:
        first = f.read(2**18)
        pieces = itertools.chain([first], iter(lambda: f.read(2**18), ""))
        if kind_of(path) in PAGES or HTML_PAGE.match(first):
            form = "page of HTML"
            documents = [HTMLText("".join(pieces)).text]
        else:
            end = repr(options.separator) if options.separator else "blank lines"
            form = f"text, documents end at {end}"
            documents = cut_documents(pieces, options.separator)
        report.forms[form] += 1
        for text in documents:
            if text.strip():
                report.records += 1
                report.place = f"document {report.records}"
                yield {"text": text.strip("\n")}
        if report.records == 1 and form != "page of HTML":
            report.remark("all of it is one document; --separator= cuts at blank lines, "
                          "--separator='\\n' at each line")


# --------------------------------------------------------------------------------------------------
# Records: values of JSON, rows of tables

def read_values(f, size=2**16):
    """The items of the JSON list in a text file, or the values that stand in it one after another;
    one at a time stands in memory. A ValueError if the file is damaged."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    text = f.read(size).lstrip()
    is_list = text.startswith("[")
    start = 1 if is_list else 0
    while True:
        start = between.match(text, start).end()
        if text.startswith("]", start):
            break
        try:
            value, start = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # Perhaps the value continues in what was not read yet: then the fault is at the very
            # end, or it is a string that has none. Reading as much again keeps this linear.
            if error.pos < len(text) - 16 and not error.msg.startswith("Unterminated"):
                raise
            more = f.read(max(size, len(text) - start))
            if not more:
                break
            text, start = text[start:] + more, 0
        else:
            yield value
    if (text[start:] + f.read()).strip() != ("]" if is_list else ""):
        raise ValueError("it breaks off, or continues after its end")


def read_lines(f):
    """The values of JSON Lines; a line that is not JSON is a Malformed instead."""
    for number, line in enumerate(f, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = Malformed("not JSON")
            yield f"line {number}", value


def read_table(f):
    """The rows of a .csv or .tsv file as objects; its first line names the fields."""
    csv.field_size_limit(2**24)
    header = f.readline()
    delimiter = max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    rows = csv.DictReader(f, names, restkey="cells without a name", delimiter=delimiter)
    for row in rows:
        yield f"line {rows.line_num + 1}", row


def read_parquet(f):
    try:
        import pyarrow.parquet
    except ImportError:
        raise SystemExit("reading .parquet files needs pyarrow: pip install pyarrow")
    for batch in pyarrow.parquet.ParquetFile(f).iter_batches(1000):
        yield from batch.to_pylist()


def read_records(path, report):
    """(place, record) for each record of a file, whatever its kind; one at a time is in memory."""
    kind = kind_of(path)
    with unpacked(path) if kind == ".parquet" else open_text(path, report) as f:
        if kind in (".csv", ".tsv"):
            places_and_records = read_table(f)
        elif kind in (".jsonl", ".ndjson"):
            places_and_records = read_lines(f)
        else:
            values = read_parquet(f) if kind == ".parquet" else read_values(f)
            places_and_records = ((f"record {n}", value) for n, value in enumerate(values, 1))
        place = "its beginning"
        try:
            for place, record in places_and_records:
                report.records += 1
                yield place, record
        except (ValueError, RecursionError, csv.Error) as error:
            reason = " ".join(str(error).split())
            raise SystemExit(f"{path}: what comes behind {place} cannot be read ({reason})")


# --------------------------------------------------------------------------------------------------
# Conversations

TOOLS = ("tool", "function", "observation")
ROLES = (dict.fromkeys(("system", "developer"), "system")
         | dict.fromkeys(("user", "human", "prompter", *TOOLS), "user")
         | dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"),
                         "assistant"))
REPLY = {"text", "response", "score", "overall_score"}
TURN = {"role", "from", "content", "value", "tool_calls", "function_call"}
SYSTEM = ("system", "system_prompt")
BELOW = ("input", "context")
ASKED = (*SYSTEM, *BELOW, "history")


def as_content(content):
    """The text of a turn; of one in parts, as of OpenAI, all must be text."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise Unusable("a part that is not text")
        content = "".join(texts)
    if not isinstance(content, str):
        raise Malformed("a number, list or object in place of text")
    if not content.strip():
        raise Unusable("an empty text")
    return content


def as_messages(turns, report):
    """Text that the user says, or a list of turns, as messages of the roles system, user and
    assistant. Tools have no role: the assistant's calls are its words, their results the user's."""
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not turns:
        raise Malformed("an empty conversation")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Malformed("a turn that is not an object")
        name = str(turn.get("role", turn.get("from"))).lower()
        if name not in ROLES:
            raise Unusable(f"a turn of the unknown role {name[:20]!r}")
        if name in TOOLS:
            report.remark("a tool's turn, read as the user's")
        content = turn.get("content", turn.get("value"))
        for key in ("tool_calls", "function_call"):
            if turn.get(key):
                calls = json.dumps(turn[key], ensure_ascii=False)
                content = f"{as_content(content)}\n{calls}" if content else calls
        messages.append({"role": ROLES[name], "content": as_content(content)})
        report.unused.update(f"{key} of a turn" for key in turn if key not in TURN)
    return messages


def as_turns(transcript, report):
    """"\\n\\nHuman: …\\n\\nAssistant: …", as in hh-rlhf, as messages."""
    before, *turns = re.split(r"(?:\A|\n\n)(Human|Assistant): ?", transcript)
    if before.strip() or not turns:
        raise Malformed("a transcript that does not begin with a turn")
    names = {"Human": "user", "Assistant": "assistant"}
    return as_messages([{"role": names[who], "content": said.strip()}
                        for who, said in zip(turns[::2], turns[1::2])], report)


def asked(record, name, report):
    """What a record asks, as messages: its system turn, its history, and what the field `name`
    holds (nothing, if that is None), with its input or context below."""
    messages = []
    for key in SYSTEM:
        if record.get(key):
            messages.append({"role": "system", "content": as_content(record[key])})
    history = record.get("history", [])
    if not isinstance(history, list):
        raise Malformed("a history that is not a list")
    for turn in history:
        turns = [turn]
        if isinstance(turn, list) and len(turn) == 2:  # Alpaca's [asked, answered]
            turns = [{"role": "user", "content": turn[0]},
                     {"role": "assistant", "content": turn[1]}]
        messages += as_messages(turns, report)
    if name:
        messages += as_messages(record[name], report)
    for key in BELOW:
        if record.get(key) and key != name:
            messages[-1]["content"] += "\n\n" + as_content(record[key])
    return messages


# --------------------------------------------------------------------------------------------------
# Forms. A record in any of them comes to (prompt, replies, scores): the messages that ask, the
# texts that answer, and, in comparisons, how good each answer is (a higher score is better). A tree
# comes to several.

def read_text(record, fields, report):
    return [], [record[fields[0]]], []


def read_conversation(record, fields, report):
    messages = asked(record, fields[0], report)
    if messages[-1]["role"] == "assistant":
        return messages[:-1], [messages[-1]["content"]], []
    return messages, [], []


def read_pair(record, fields, report):
    """A prompt and a reply; or a prompt, a reply and what it is rated."""
    ask, answer, *rating = fields
    reply, between = record[answer], []
    if isinstance(reply, list):
        *between, last = as_messages(reply, report)
        reply = last["content"]
    return asked(record, ask, report) + between, [reply], [record[name] for name in rating]


def read_choice(record, fields, report):
    """Two replies, chosen and rejected: texts to a prompt, or conversations that differ in their
    last turn."""
    *ask, chosen, rejected = fields
    prompt = asked(record, ask[0] if ask else None, report)
    prompts, replies = [], []
    for side in (record[chosen], record[rejected]):
        if ask and isinstance(side, str):
            earlier, reply = [], side
        else:
            turns = as_turns(side, report) if isinstance(side, str) else as_messages(side, report)
            earlier, reply = turns[:-1], turns[-1]["content"]
            if turns[-1]["role"] != "assistant":
                raise Unusable("it does not end with the assistant's turn")
        # A conversation may repeat the prompt, or begin behind it.
        prompts.append([turn for turn in prompt if turn not in earlier] + earlier)
        replies.append(reply)
    if prompts[0] != prompts[1]:
        raise Unusable("two different prompts")
    return prompts[0], replies, [1, 0]


def read_replies(record, fields, report):
    """A list of replies with a list of scores, a score each, or a ranking in groups of indices."""
    ask, answers, *judgement = fields
    if not isinstance(record[answers], list):
        raise Malformed(f"{answers}: not a list")
    replies, scores = [], []
    for reply in record[answers]:
        if isinstance(reply, dict):
            scores.append(reply.get("score", reply.get("overall_score")))
            report.unused.update(f"{key} of a reply" for key in reply if key not in REPLY)
            reply = reply.get("text", reply.get("response"))
        replies.append(reply)
    if judgement == ["scores"]:
        scores = record["scores"]
    if judgement == ["ranking"]:
        ranking = record["ranking"]
        if not isinstance(ranking, list) or not all(isinstance(group, list) for group in ranking):
            raise Malformed("ranking: not a list of groups")
        if sorted(map(str, itertools.chain(*ranking))) != sorted(map(str, range(len(replies)))):
            raise Malformed("a ranking that does not name each reply once")
        scores = [-place for i in range(len(replies))
                  for place, group in enumerate(ranking) if i in group]
    return asked(record, ask, report), replies, scores


def read_strength(record, fields, report):
    """Two replies, and by how much the second is better: less than 0, where the first is."""
    ask, first, second, strength = fields
    report.remark("a preference's strength, of which only the sign was used")
    return asked(record, ask, report), [record[first], record[second]], [0, record[strength]]


def as_node(message, role, report, gone=False):
    """A message of a tree as (its turn, its rank or infinity, the replies to it); None if it, or a
    message above it, is deleted or empty."""
    replies = isinstance(message, dict) and (message.get("replies") or [])
    if not isinstance(replies, list):
        raise Malformed("a tree of something else than messages")
    text, rank = message.get("text"), message.get("rank")
    gone = gone or message.get("deleted") or text is None or not str(text).strip()
    other = "assistant" if role == "user" else "user"
    nodes = [as_node(reply, other, report, gone) for reply in replies]
    if gone:
        report.remark("left out: a message that is deleted or empty, or below such a one")
        return None
    read = ("text", "deleted", "replies", "rank" if role == "assistant" else "")
    rest = {key: message[key] for key in message if key not in read and message[key] is not None}
    turn, = as_messages([rest | {"content": text}], report)
    if turn["role"] != role:
        raise Malformed("a tree in which the user and the assistant do not take turns")
    return turn, math.inf if rank is None else as_number(rank), [node for node in nodes if node]


def compared_replies(node, before, report):
    """The ranked replies to a user's turn of a tree, and those to each of the turns below it."""
    turn, _, replies = node
    prompt = [*before, turn]
    ranked = [(reply["content"], -rank) for reply, rank, _ in replies if rank < math.inf]
    for _ in replies[len(ranked):]:
        report.remark("left out: a reply without a rank")
    yield prompt, [text for text, _ in ranked], [score for _, score in ranked]
    for reply, _, nodes in replies:
        for node in nodes:
            yield from compared_replies(node, [*prompt, reply], report)


def best_conversations(node, before, report):
    """The conversations along the best replies, or the first where none has a rank: one for each
    way in which the user goes on and is answered."""
    turn, _, replies = node
    if not replies:
        report.remark("left out: a user's turn that nobody answers")
        return []
    for _ in replies[1:]:
        report.remark("left out: a reply that is not the best, and all below it")
    best, _, nodes = min(replies, key=lambda reply: reply[1])
    prompt = [*before, turn]
    longer = [best_conversations(node, [*prompt, best], report) for node in nodes]
    return list(itertools.chain(*longer)) or [(prompt, [best["content"]], [])]


def read_tree(record, task, report):
    """What a tree of messages comes to, a list."""
    node = as_node(record["prompt"], "user", report)
    if not node:
        raise Unusable("a tree that begins with a deleted or empty message")
    if task == "prompts":
        report.remark("a tree, of which the first turn was taken")
        return [([node[0]], [], [])]
    if task == "comparisons":
        return list(compared_replies(node, [], report))
    return best_conversations(node, [], report)


@dataclass(frozen=True)
class Form:
    """A form of records: its name, the fields that tell it, the function that reads it, and further
    fields that are read where a record has them. ASK, ANSWER, RATING and TEXT stand for the fields
    that the options name."""
    name: str
    needs: str
    read: Callable
    also: tuple = ASKED


CONVERSATIONS = (
    Form("chat messages", "messages", read_conversation, SYSTEM),
    Form("ShareGPT conversations", "conversations", read_conversation, SYSTEM),
    Form("Alpaca", "instruction output", read_pair),
    Form("Dolly", "instruction response", read_pair),
    Form("KTO", "prompt completion label", read_pair),
    Form("TRL", "prompt completion", read_pair),
    Form("question and answer", "question answer", read_pair),
    Form("prompt and response", "ASK ANSWER", read_pair))
COMPARISONS = (
    Form("scored replies", "ASK responses scores", read_replies),
    Form("ranked replies", "ASK responses ranking", read_replies),
    Form("replies, each with its score", "ASK responses", read_replies),
    Form("UltraFeedback", "ASK completions", read_replies),
    Form("chosen and rejected", "ASK chosen rejected", read_choice),
    Form("hh-rlhf", "chosen rejected", read_choice, SYSTEM),
    Form("KTO", "ASK completion label", read_pair),
    Form("HelpSteer", "ASK ANSWER RATING", read_pair),
    Form("HelpSteer2-preference", "ASK response_1 response_2 preference_strength", read_strength),
    Form("OpenAssistant", "message_tree_id prompt", read_tree, ()))
# By what is to be made of the records; the first form whose fields a record has is its form.
FORMS = {"text": (Form("text in a field", "TEXT", read_text, ()), *CONVERSATIONS, *COMPARISONS),
         "demonstrations": (*CONVERSATIONS, *COMPARISONS), "comparisons": COMPARISONS,
         "prompts": (*COMPARISONS, *CONVERSATIONS, Form("prompt", "ASK", read_conversation))}


def recognise(record, options, report):
    """(the form of a record, the names of the fields it needs, the part of the record it reads)."""
    if isinstance(record, Malformed):
        raise record
    if isinstance(record, list) and record and isinstance(record[0], dict):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise Malformed("not a JSON object")
    record = {name: value for name, value in record.items() if value is not None}
    for form in options.forms:
        fields = []
        for need in form.needs.split():
            fields += [name for name in options.names.get(need, [need]) if name in record][:1]
        if len(fields) == len(form.needs.split()):
            report.forms[form.name] += 1
            part = {name: record[name] for name in record if name in (*fields, *form.also)}
            report.unused.update(name for name in record if name not in part)
            return form, fields, part
    names = " ".join(", ".join(record).split()) or "none"
    raise Malformed(f"fields of no known form: {names[:300]}")


# --------------------------------------------------------------------------------------------------
# Plain records

def as_number(score):
    try:
        if isinstance(score, (int, float, str)) and math.isfinite(float(score)):
            return float(score)
    except (ValueError, OverflowError):
        pass
    raise Malformed("a score that is not a number")


def best_reply(replies, scores, report):
    """The only reply, unless it is labelled as bad; the best of several."""
    if len(replies) == 1:
        if scores and not scores[0]:
            raise Unusable("a reply that is labelled as bad")
        return as_content(replies[0])
    if not isinstance(scores, list) or len(scores) != len(replies):
        raise Malformed("not as many scores as replies")
    report.remark("a comparison, of which the best reply was taken")
    numbers = [as_number(score) for score in scores]
    return as_content(replies[numbers.index(max(numbers))])


def plain_text(prompt, replies, scores, report):
    """A text as it is; of a conversation all that is said, with a blank line between the turns."""
    said = [message["content"] for message in prompt]
    if replies:
        said.append(best_reply(replies, scores, report))
    return {"text": "\n\n".join(said)}


def plain_demonstration(prompt, replies, scores, report):
    if not replies:
        raise Unusable("it does not end with the assistant's turn")
    if not any(message["role"] == "user" for message in prompt):
        raise Unusable("nothing asks: there is no turn of the user's")
    reply = best_reply(replies, scores, report)
    return {"messages": [*prompt, {"role": "assistant", "content": reply}]}


def prompt_id(prompt):
    """An id that depends on the text of a prompt alone, as prepare.py makes it."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:12]


def plain_prompt(prompt, replies, scores, report):
    if not prompt or prompt[-1]["role"] != "user":
        raise Unusable("a prompt that does not end with the user's turn")
    return {"id": prompt_id(prompt), "prompt": prompt if prompt[1:] else prompt[0]["content"]}


def plain_comparison(prompt, replies, scores, report):
    """A ranking of the replies, in which equal scores are ties. Of several replies, those that are
    empty or repeat another are left out."""
    if not isinstance(scores, list) or len(scores) != len(replies):
        raise Malformed("not as many scores as replies")
    if not all(isinstance(reply, str) for reply in replies):
        raise Malformed("a reply that is not text")
    if len(replies) < 2:
        raise Unusable("a prompt with fewer than two replies: nothing to compare")
    kept = {}
    for reply, score in zip(replies, scores):
        if reply.strip():
            kept.setdefault(reply, as_number(score))
    if len(kept) < 2:
        raise Unusable("two equal replies" if all(map(str.strip, replies)) else "an empty reply")
    levels = sorted(set(kept.values()), reverse=True)
    if len(levels) < 2:
        raise Unusable("all replies are tied")
    for _ in replies[len(kept):]:
        report.remark("an empty or repeated reply, left out of a longer list")
    return plain_prompt(prompt, replies, scores, report) | {
        "responses": [{"text": reply} for reply in kept],
        "ranking": [[i for i, score in enumerate(kept.values()) if score == level]
                    for level in levels],
        "annotator": "people"}


PLAIN = {"text": plain_text, "demonstrations": plain_demonstration,
         "comparisons": plain_comparison, "prompts": plain_prompt}


def read_parts(record, rated, options, report):
    """What a record comes to, as a list. A single rated reply comes to nothing yet: it joins those
    to the same prompt in `rated`, which come here when all records are read."""
    if isinstance(record, tuple):
        return [record]
    form, fields, part = recognise(record, options, report)
    if form.read is read_tree:
        return read_tree(part, options.task, report)
    prompt, replies, scores = form.read(part, fields, report)
    if options.task != "comparisons" or form.read is not read_pair:
        return [(prompt, replies, scores)]
    _, together = rated.setdefault(prompt_id(prompt), (report.place, (prompt, [], [])))
    together[1].extend(replies)
    together[2].extend(scores)
    return []


def begins_with_record(path):
    """Whether a file begins with a line that is an object of JSON, whatever its name is."""
    with open_text(path, Report(path)) as f, contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(f.readline(2**20)), dict)
    return False


def convert_file(path, options, report):
    """The plain records of a file, one at a time."""
    named = kind_of(path) in RECORDS
    if options.task == "text" and not named and not begins_with_record(path):
        yield from read_documents(path, options, report)
        return
    rated = {}
    for place, record in itertools.chain(read_records(path, report), rated.values()):
        report.place, parts = place, []
        with report.leaving_out_faults():
            parts = read_parts(record, rated, options, report)
        for part in parts:
            with report.leaving_out_faults():
                yield PLAIN[options.task](*part, report)
        if report.bad == report.records == 100:
            break


# --------------------------------------------------------------------------------------------------
# The command

def list_forms(forms, names):
    """The names of forms, each with the fields that tell it."""
    listed = []
    for form in forms:
        fields = [names.get(need, [need])[0] for need in form.needs.split()]
        listed.append(f"{form.name} ({', '.join(fields)})")
    return "; ".join(listed)


def known_forms(options):
    """The end of an error's line: what would have been recognised."""
    other = "--text_field=NAME" if options.task == "text" else "--fields=ASK,ANSWER"
    forms = list_forms(options.forms, options.names)
    return f"known forms of {options.task}: {forms}; {other} names other fields"


def write_records(paths, options, out):
    """Write the plain records of all files, and tell what was found in each."""
    seen, written, example, reasons, said = set(), 0, None, Counter(), time.time()
    for path in paths:
        report = Report(path)
        for record in convert_file(path, options, report):
            if options.task == "prompts":
                if record["id"] in seen:
                    report.leave_out(Unusable("a prompt that came before"))
                    continue
                seen.add(record["id"])
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            report.taken += 1
            example = example or record
            if time.time() - said > 10:
                said = time.time()
                print(f"  {written + report.taken:,} records", flush=True)
        report.show()
        if 20 * report.bad > report.records:
            raise SystemExit(f"{path}: {report.bad:,} of {report.records:,} records cannot be read "
                             f"({report.first_bad}); {known_forms(options)}")
        written += report.taken
        reasons.update(report.remarks)
    if not written:
        reason = "; ".join(f"{what}: {n:,}" for what, n in reasons.most_common(3)) or "it is empty"
        raise SystemExit(f"{' '.join(options.files)}: no record can be used ({reason})")
    print(f"{written:,} records in {options.to}, of which the first is")
    for name, value in example.items():
        print(f"    {name}: {json.dumps(value, ensure_ascii=False)[:500]}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise SystemExit(f"{message}; python data/convert.py --help lists the options")


def help_on_forms():
    """What --help says of the known forms."""
    names = {"ASK": ["prompt"], "ANSWER": ["response"], "RATING": ["helpfulness"],
             "TEXT": ["text"]}
    lines = ["forms of records, and the fields that tell them; a prompt may be called instruction",
             "or question, and --fields, --rating and --text_field give other names:"]
    for heading, forms in (("text", FORMS["text"][:1]),
                           ("demonstrations, text, prompts", CONVERSATIONS),
                           ("comparisons, demonstrations, text, prompts", COMPARISONS),
                           ("prompts", FORMS["prompts"][-1:])):
        listed = list_forms(forms, names).split("; ")
        lines += [f"  as {heading}:", *(f"    {form}" for form in listed)]
    return "\n".join(lines)


def parse_options(argv):
    parser = Parser(description=__doc__, epilog=help_on_forms(), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files, folders, globs, URLs")
    parser.add_argument("--as", dest="task", required=True, choices=list(FORMS),
                        help="what to make of them")
    parser.add_argument("--to", required=True, help="the file to write; it must not exist")
    parser.add_argument("--text_field", default="text", help="the field of records that holds text")
    parser.add_argument("--fields", default="prompt,response",
                        help="two fields that ask and answer, if no known form has them")
    parser.add_argument("--rating", default="helpfulness", help="the field that rates one reply")
    parser.add_argument("--separator", default="<|endoftext|>", help="ends a document in a text "
                        "file; \\n: each line is one; empty: they end at blank lines")
    parser.add_argument("--downloads", help="folder for what URLs name (default: beside --to)")
    options = parser.parse_args(argv)
    fields = [name.strip() for name in options.fields.split(",")]
    if len(fields) != 2 or not all(fields):
        parser.error(f"--fields={options.fields}: name two, with a comma between, as in ask,answer")
    ask, answer = fields
    options.forms = FORMS[options.task]
    if options.fields != parser.get_default("fields"):  # what is named comes before what is known
        options.forms = sorted(options.forms, key=lambda form: "ASK" not in form.needs)
    options.names = {"ASK": [ask, "prompt", "instruction", "question"],
                     "ANSWER": [answer, "response"],
                     "RATING": [options.rating], "TEXT": [options.text_field]}
    options.separator = options.separator.replace("\\n", "\n")
    folder = os.path.dirname(os.path.abspath(options.to))
    options.downloads = options.downloads or os.path.join(folder, "downloads")
    return options


def main(argv=None):
    options = parse_options(argv)
    if os.path.exists(options.to):
        raise SystemExit(f"{options.to} is there already: move it, or give another name to --to")
    kinds = (*TEXTS, *RECORDS) if options.task == "text" else RECORDS
    paths = find_files(options.files, kinds, options.downloads)
    temporary = f"{options.to}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(options.to)), exist_ok=True)
        # JSON can name halves of characters, which no file can hold: they become "?".
        with open(temporary, "w", encoding="utf-8", errors="replace", newline="\n") as out:
            write_records(paths, options, out)
        os.replace(temporary, options.to)
    except OSError as error:
        raise SystemExit(f"{options.to} cannot be written: {error}")
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
