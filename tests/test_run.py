"""What running a stage needs: options and config files, resuming, the processes' shares of a batch,
checkpoints, locks and the log."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
import torch

import model as model_module
from chain import SHAPE, assert_identical, fail, one_line, read_lines, succeed
from model import (LanguageModel, ModelConfig, Optimizer, Run, TrainConfig, forget_steps_after,
                   load_checkpoint, load_config, need, option, replacing, restore)
from prepare import random_stream
from sft import SFTConfig
from test_model import language_model
from test_prepare import pages, run_prepare, write

CONFIGS = {name: getattr(importlib.import_module(name), config) for name, config in dict(
    prepare="PrepareConfig", pretrain="PretrainConfig", sft="SFTConfig", reward="RewardConfig",
    ppo="PPOConfig", sample="SampleConfig").items()}


@dataclass
class StageConfig(ModelConfig, TrainConfig):
    table = "stage"
    rate: float = option(1e-3, "a rate, 5 % of something", low=0)
    share: float = option(0.1, "a share", low=0, high=1)
    word: str = option("word", "any text")
    compile: bool = option(False, "an option that changes no result")


def load(*argv):
    return load_config(StageConfig, "A stage.", list(argv))


def config_file(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(text, encoding="utf-8")
    return f"--config={path}"


@pytest.fixture(autouse=True)
def signals():
    """A stage that starts takes over Ctrl-C and SIGTERM; afterwards they are pytest's again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# Options

def test_config_precedence(tmp_path):
    """Defaults, then the file's top level and the tables that concern the stage, then the command
    line; each value has its type."""
    assert load() == StageConfig()
    file = config_file(tmp_path, 'seed = 5\nout_dir = "a b=c"\n[model]\nn_embd = 64\n'
                                 '[stage]\nrate = 1\ncompile = true\nword = "--x"\n[ppo]\nx = [1]')
    config = load(file)
    assert (config.seed, config.out_dir, config.n_embd) == (5, "a b=c", 64)
    assert (config.rate, config.compile, config.word) == (1.0, True, "--x")
    assert type(config.rate) is float and config.n_layer == StageConfig().n_layer
    config = load("--n_embd", "32", file, "--rate=2e-4", "--compile=false", "--seed=6")
    assert (config.seed, config.n_embd, config.rate, config.compile) == (6, 32, 2e-4, False)
    assert load("--compile").compile is True and load("--compile=TRUE").compile is True


@pytest.mark.parametrize("cls", [StageConfig, *CONFIGS.values()], ids=lambda cls: cls.__name__)
def test_help_lists_every_option(capsys, cls):
    """--help names every option with what it is and its default, and ends well."""
    with pytest.raises(SystemExit) as caught:
        load_config(cls, "A stage that costs 5 %.", ["--help"])
    assert caught.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # lines end anywhere, also at hyphens
    options = [f for f in fields(cls) if f.metadata]
    assert "Astagethatcosts5%." in shown and len(options) > 7
    defaults = re.findall(r"\(default:(.*?)\)", shown)
    assert defaults == [repr(f.default) for f in options]
    for f in options:
        assert f"--{f.name}" in shown and "".join(f.metadata["help"].split()) in shown


@pytest.mark.parametrize("argv, words", [
    (["--n_layers=3"], ["--n_layers", "did you mean --n_layer?"]),
    (["--n_lay=3"], ["--n_lay"]),
    (["rate=3"], ["rate=3", "--rate"]),
    (["--n_layer=three"], ["n_layer", "int", "three"]),
    (["--n_layer=2.5"], ["n_layer", "int"]),
    (["--rate=nan"], ["rate"]),
    (["--rate=inf"], ["rate"]),
    (["--rate=1" + 400 * "0"], ["rate"]),
    (["--rate=fast"], ["rate", "float", "fast"]),
    (["--compile=maybe"], ["compile", "bool", "maybe"]),
    (["--compile=1"], ["compile", "bool"]),
    (["--compile=nan"], ["compile", "bool"]),
    (["--n_layer=0"], ["n_layer", "1", "0"]),
    (["--share=1.5"], ["share", "0", "1", "1.5"]),
    (["--device=tpu"], ["device", "tpu", "cuda"]),
    (["--seed=-1"], ["seed", "from 0 to 18446744073709551615", "-1"]),
    ([f"--seed={2**64}"], ["seed", "from 0 to 18446744073709551615", str(2**64)]),
    (["--rate"], ["--rate", "argument"]),
    (["--n_embd=130"], ["n_head=4", "n_embd=130"]),
    (["--n_kv_head=3"], ["n_kv_head=3", "n_head=4"]),
    (["--vocab_size=300"], ["--vocab_size"]),
    (["--config=no/such.toml"], ["no/such.toml"])])
def test_config_mistakes_on_the_command_line(argv, words):
    """A mistaken option ends the program in one line that names it."""
    message = one_line(load, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text, words", [
    ("sede = 3", ["sede", "seed"]),
    ("[stage]\nrates = 3", ["rates", "rate"]),
    ("[stgae]\nrate = 3", ["stgae", "did you mean [stage]?"]),
    ("[modle]\nn_layer = 3", ["modle", "did you mean [model]?"]),
    ("[model]\nn_layer = 'four'", ["n_layer", "four"]),
    ("[model]\nn_layer = true", ["n_layer", "int"]),
    ("[model]\nn_layer = 2.5", ["n_layer", "int"]),
    ("[model]\nn_kv_head = 3", ["n_kv_head=3"]),
    ("[stage]\nshare = -1", ["share", "-1"]),
    ("[stage]\ncompile = 1", ["compile", "bool"]),
    ("device = 'tpu'", ["device", "tpu"]),
    ("[stage\nrate = 3", ["cannot read"]),
    ("[stage]\nrate = 1" + 400 * "0", ["rate"]),
    ("seed = 1" + 5000 * "0", ["cannot read"]),
    ("seed = " + 5000 * "[", ["cannot read"]),
    ("stage = 3", ["stage"]),
    ("[[stage]]\nrate = 3", ["stage"]),
    ("[stage.x]\nrate = 3", ["x"])])
def test_config_mistakes_in_the_file(tmp_path, text, words):
    """A mistake in the file ends the program in one line that names the file and the key."""
    message = one_line(load, config_file(tmp_path, text))
    assert all(word in message for word in ["some.toml", *words]), message


@pytest.mark.parametrize("table", ["sftt", "sfft"])
def test_a_misspelt_table_of_a_short_name(tmp_path, table):
    """Also of a stage with a short name a misspelt table is an error, not somebody else's table."""
    argv = [config_file(tmp_path, f"[{table}]\nepochs = 3")]
    assert "[sft]" in one_line(load_config, SFTConfig, "", argv)


@pytest.mark.parametrize("cls", CONFIGS.values(), ids=CONFIGS)
def test_tables_of_others_are_theirs(tmp_path, cls):
    """A stage passes over all tables but its own, whatever is in them: a new stage needs no change
    elsewhere."""
    ours = {cls.table, "model"} if issubclass(cls, ModelConfig) else {cls.table}
    others = sorted({*CONFIGS, "model", "dpo", "overoptimize"} - ours)
    text = "".join(f"[{name}]\nwhatever = 3\n" for name in others)
    assert load_config(cls, "", [config_file(tmp_path, text)]) == cls()


def test_mistakes_of_the_program_keep_their_traceback(monkeypatch):
    """Only users' mistakes end in one line: a fault in a stage's own check shows where it is."""
    monkeypatch.setattr(StageConfig, "check", lambda self: undefined)  # noqa: F821
    with pytest.raises(NameError):
        load()
    monkeypatch.setattr(StageConfig, "check", lambda self: self.word + 1)
    with pytest.raises(TypeError):
        load()


def test_options_where_output_is_no_terminal():
    """In a notebook, where sys.stdout is another kind of object, options can be read, too."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert load("--rate=0.5").rate == 0.5


# --------------------------------------------------------------------------------------------------
# Options of a run that is resumed

def a_run(out_dir, **options):
    return Run(StageConfig(**dict(out_dir=str(out_dir), device="cpu", dtype="float32") | options))


def end(run):
    """What the end of a run's process does: another run may work in its folder."""
    run.lock.release()


def stopped_run(out_dir, **options):
    """A folder in which a stage has stopped after step 7; returns its (run, model, optimizer)."""
    os.makedirs(out_dir, exist_ok=True)
    run, model = a_run(out_dir, **options), language_model()
    optimizer = Optimizer(model, 1e-3, 0.02)
    run.start(model=model, optimizer=optimizer)
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    run.save_last(True, model, 7, optimizer=optimizer.state_dict(), best=0.5, tokenizer="abc")
    end(run)
    return run, model, optimizer


def test_resume_takes_the_options_of_the_checkpoint(tmp_path, monkeypatch):
    """With --resume a run goes on with the options and the dtype that it had, not with defaults and
    not with what would be measured now."""
    rates = {torch.bfloat16: 2e9, torch.float32: 1e9}
    monkeypatch.setattr(model_module, "matrix_rate", lambda device, dtype: rates[dtype])
    run, _, _ = stopped_run(tmp_path, dtype="auto", rate=0.5, n_embd=64, seed=9)
    assert run.dtype == torch.bfloat16
    config = load(f"--out_dir={tmp_path}", "--resume")
    assert (config.rate, config.n_embd, config.seed, config.resume) == (0.5, 64, 9, True)
    rates[torch.bfloat16] = 1.0
    assert config.dtype == "bfloat16" and Run(config).dtype == torch.bfloat16


@pytest.mark.parametrize("argv, words", [
    (["--rate=0.25"], ["rate=0.5", "0.25"]), (["--seed=1"], ["seed=9", "1"]),
    (["--n_embd=128"], ["n_embd=64", "128"]),
    (["--dtype=bfloat16"], ["dtype=float32", "bfloat16"])])
def test_resume_refuses_a_different_option(tmp_path, argv, words):
    """An option that differs from the checkpoint's is an error that names both, also if it is the
    default, and also in a config file; the same one may be given again."""
    stopped_run(tmp_path, rate=0.5, n_embd=64, seed=9)
    resume = [f"--out_dir={tmp_path}", "--resume"]
    message = one_line(load, *resume, *argv)
    assert all(word in message for word in ["stage.last.pt", *words]), message
    name, _, value = argv[0][2:].partition("=")
    value = repr(value) if name == "dtype" else value
    table = dict(rate="[stage]\n", n_embd="[model]\n").get(name, "")
    file = config_file(tmp_path, f"{table}{name} = {value}")
    assert words[0] in one_line(load, *resume, file)
    assert load(*resume, "--rate=0.5", "--seed=9", "--dtype=float32").rate == 0.5


def test_resume_allows_what_changes_no_result(tmp_path):
    """Where a run lies, on what device and in what pieces it is computed may change."""
    stopped_run(tmp_path / "a", micro_batch_size=4, rate=0.5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = load(f"--out_dir={tmp_path / 'b'}", "--resume", "--micro_batch_size=2",
                  "--device=auto", "--compile")
    assert (config.micro_batch_size, config.device, config.compile) == (2, "auto", True)
    assert config.out_dir == str(tmp_path / "b") and config.rate == 0.5


def test_resume_goes_on_where_the_checkpoint_lies(tmp_path, monkeypatch):
    """A run that was made elsewhere and now lies in the default folder goes on there, not where it
    was made."""
    stopped_run(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    shutil.copytree("elsewhere", "out/tiny")
    assert load("--resume").out_dir == "out/tiny"


def test_resume_refuses_another_tokenizer(tmp_path):
    """Weights that have begun to learn one tokenizer's tokens do not go on with another one's,
    though it has as many."""
    options = [*SHAPE, "--max_steps=4", "--batch_size=2", "--eval_every=2"]
    for seed in range(2):
        text = write(tmp_path / f"{seed}.jsonl", [dict(text=page) for page in pages(300, seed)])
        run_prepare(tmp_path / "out", f"--text={text}", f"--seed={seed}")
        if seed == 0:
            succeed("pretrain", tmp_path / "out", *options)
    assert "another tokenizer" in fail("pretrain", tmp_path / "out", *options, "--resume")


def test_resume_without_a_checkpoint(tmp_path):
    """Where there is nothing to resume, one line names the file and the command."""
    message = one_line(load, f"--out_dir={tmp_path}", "--resume")
    assert "stage.last.pt" in message and "python stage.py" in message


# --------------------------------------------------------------------------------------------------
# Devices and processes

def test_a_device_that_is_not_there(monkeypatch, tmp_path):
    """A device that the machine lacks is named in one line; auto takes what there is."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        assert f"--device={name}" in one_line(a_run, tmp_path, device=name)
    assert a_run(tmp_path, device="auto").device.type == "cpu"


def test_evaluating(tmp_path):
    """While a model is evaluated it builds no graph and is in evaluation mode; then all is as
    before."""
    run, model = a_run(tmp_path), language_model()
    for model.training in (True, False):
        before = model.training
        with run.evaluating(model):
            assert not model.training and not model(torch.tensor([[1]])).requires_grad
        assert model.training == before and torch.is_grad_enabled()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_processes_share_work_that_is_gathered(tmp_path, world):
    """The parts of all processes are all the work, in order, and of about equal size."""
    run = a_run(tmp_path)
    run.world = world
    for n in (0, 1, 5, 16):
        shares = []
        for run.rank in range(world):
            shares.append(list(run.share(n)))
        assert sum(shares, []) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Wrapped:
    """In place of a model in DistributedDataParallel: knows whether it should exchange
    gradients."""
    require_backward_grad_sync = True


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 64])
def test_micro_batches_cover_a_batch(tmp_path, world, micro_batch_size):
    """The processes' slices hold each row once and no more than micro_batch_size rows at once;
    every process has rows of all lengths, and exchanges gradients once, with its last slice."""
    run, rows, seen = a_run(tmp_path, micro_batch_size=micro_batch_size), torch.arange(12), []
    run.world, models = world, [Wrapped(), Wrapped()]
    for run.rank in range(world):
        exchanges, mine = [], []
        for piece in run.micro_batches(12, *models):
            assert rows[piece].tolist() == list(range(12))[piece]  # of tensors and of lists
            assert 0 < len(rows[piece]) <= micro_batch_size
            mine += rows[piece].tolist()
            exchanges.append([model.require_backward_grad_sync for model in models])
        assert mine == list(range(run.rank, 12, world))
        assert exchanges == [[False, False]] * (len(exchanges) - 1) + [[True, True]]
        seen += mine
    assert sorted(seen) == list(range(12))


def test_a_batch_that_processes_cannot_share(tmp_path):
    """A batch whose size the number of processes does not divide is refused before anything is
    computed: a mean over unequal shares would be another one."""
    run = a_run(tmp_path)
    run.world = 3
    message = one_line(lambda: list(run.micro_batches(16)))
    assert "3 processes" in message and "16" in message


def test_token_weighted_mean_over_micro_batches(tmp_path):
    """Rows with one target of loss 2 and with three of loss 1 have a mean of 1.25, as each
    micro-batch is weighted by its targets; a mean of the rows' means would say 1.5."""
    run, losses = a_run(tmp_path, micro_batch_size=1), torch.tensor([[2.0, 0, 0], [1, 1, 1]])
    weight, total = torch.ones((), requires_grad=True), 0.0
    for rows in run.micro_batches(2):
        part = (weight * losses[rows]).sum() / 4
        (part * run.world).backward()
        total += part.item()
    assert total == 1.25 and weight.grad == 1.25


# --------------------------------------------------------------------------------------------------
# Checkpoints

def test_checkpoint_round_trip(tmp_path):
    """A saved run gives back weights, optimizer, random numbers, shape and step, bit for bit; and
    so is the next step."""
    run, model, optimizer = stopped_run(tmp_path)
    expected = torch.rand(3)
    checkpoint = load_checkpoint(run.path("stage.last.pt"), "python stage.py", "abc")
    assert checkpoint["step"] == 7 and checkpoint["model_config"] == model.model.config
    assert checkpoint["config"] == asdict(run.config) and checkpoint["dtype"] == "float32"
    assert_identical(dict(model.state_dict()), dict(checkpoint["model"]), "weights")
    restored = restore(LanguageModel, checkpoint, "cpu")
    assert_identical(dict(model.state_dict()), dict(restored.state_dict()), "restored")

    again = LanguageModel(checkpoint["model_config"])
    optimizer_again = Optimizer(again, 1e-3, 0.02)
    resumed = a_run(tmp_path, resume=True).start(model=again, optimizer=optimizer_again)
    assert resumed["step"] == 7 and resumed["best"] == 0.5
    assert torch.equal(torch.rand(3), expected)
    for m, o in ((model, optimizer), (again, optimizer_again)):
        m(torch.tensor([[4, 5, 6]])).square().sum().backward()
        o.step(0.5)
    assert_identical(dict(model.state_dict()), dict(again.state_dict()), "after a step")
    assert_identical(optimizer.state_dict(), optimizer_again.state_dict(), "optimizer")
    assert not list(tmp_path.glob("*.tmp"))


def test_an_earlier_run_is_kept(tmp_path, capsys):
    """A fresh run moves the STAGE.pt that it finds to STAGE.old.pt, and says so; a resumed run
    leaves it where it is."""
    run, model, _ = stopped_run(tmp_path)
    (tmp_path / "stage.pt").write_bytes(b"of the first run")
    run = a_run(tmp_path, resume=True)
    run.start(model=model)
    end(run)
    assert (tmp_path / "stage.pt").exists() and not (tmp_path / "stage.old.pt").exists()
    capsys.readouterr()
    assert a_run(tmp_path).start(model=model) == {}
    assert (tmp_path / "stage.old.pt").read_bytes() == b"of the first run"
    assert not (tmp_path / "stage.pt").exists() and "stage.old.pt" in capsys.readouterr().out


def test_stopping_saves_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    """After Ctrl-C the step under way is finished and saved, though nothing was due; the second
    time the run ends at once."""
    run, model, _ = stopped_run(tmp_path)
    run.save_last(False, model, 8, tokenizer="abc")
    assert load_checkpoint(run.path("stage.last.pt"), "")["step"] == 7
    monkeypatch.setattr(sys, "argv", ["stage.py", "--out_dir=a b", "--resume"])
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        run.save_last(False, model, 9, tokenizer="abc")
    assert stopped.value.code == 130 and load_checkpoint(run.path("stage.last.pt"), "")["step"] == 9
    assert "python stage.py '--out_dir=a b' --resume" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def refused(path):
    message = one_line(load_checkpoint, str(path), "python sft.py", "abc")
    assert path.name in message and "python sft.py" in message
    return message


def test_truncated_checkpoints_are_named(tmp_path):
    """A missing file, and one that was cut off wherever it may be, ends the program in one line
    that names it and the command to run."""
    run, _, _ = stopped_run(tmp_path)
    path = tmp_path / "stage.last.pt"
    whole = path.read_bytes()
    for size in [*range(0, 200, 20), *range(200, len(whole), 1999), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path)
    refused(tmp_path / "missing.pt")


def test_a_changed_weight_is_noticed(tmp_path):
    """A bit of a weight that has changed, which torch.load would not mind, is damage."""
    run, model, _ = stopped_run(tmp_path)
    path = tmp_path / "stage.last.pt"
    damaged = bytearray(path.read_bytes())
    weights = model.model.layers[1].mlp.up_proj.weight.detach().numpy().tobytes()
    damaged[damaged.index(weights) + 1000] ^= 1
    path.write_bytes(damaged)
    torch.load(path, weights_only=True)
    refused(path)


@pytest.mark.parametrize("content", [
    [1, 2], {}, {"model_config": 5}, {"model_config": {"n_layer": 1}}, 5, torch.ones(2)],
    ids=range(6))
def test_foreign_checkpoints_are_named(tmp_path, content):
    """So does a file of torch's, or none of torch's, that holds something else."""
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_text("not a checkpoint at all")
    refused(tmp_path / "a.pt")


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_executes_nothing(tmp_path):
    """A checkpoint that hides code is refused in one line, and none of the code runs."""
    path, harm = tmp_path / "a.pt", tmp_path / "harm"
    shape = asdict(language_model().model.config)
    for content in (Payload(harm), dict(model_config=shape, model=Payload(harm), tokenizer="abc")):
        torch.save(content, path)
        refused(path)
        assert not harm.exists()
    torch.load(path, weights_only=False)
    assert harm.exists()  # the payload is a real one


def test_checkpoint_of_another_tokenizer_is_refused(tmp_path):
    """Weights are not used with a tokenizer that they were not trained with."""
    run, _, _ = stopped_run(tmp_path)
    message = one_line(load_checkpoint, run.path("stage.last.pt"), "python sft.py", "xyz")
    assert all(w in message for w in ("stage.last.pt", "another tokenizer", "python sft.py"))
    assert load_checkpoint(run.path("stage.last.pt"), "python sft.py", "abc")["tokenizer"] == "abc"


def test_errors_of_the_program_surface(tmp_path, monkeypatch):
    """A fault in our own code keeps its traceback: it is never taken for a damaged file."""
    run, _, _ = stopped_run(tmp_path)
    path = run.path("stage.last.pt")

    class Broken(LanguageModel):
        def __init__(self, config):
            super().__init__(config, undefined)  # noqa: F821

    checkpoint = load_checkpoint(path, "python sft.py")
    with pytest.raises(NameError):
        restore(Broken, checkpoint, "cpu")
    with pytest.raises(TypeError):
        restore(lambda config: config + 1, checkpoint, "cpu")
    with pytest.raises(TypeError):
        with replacing(run.path("a.txt")) as f:
            f.write(5)
    assert not (tmp_path / "a.txt").exists()
    monkeypatch.setattr(model_module, "ModelConfig", lambda **shape: undefined)  # noqa: F821
    with pytest.raises(NameError):
        load_checkpoint(path, "python sft.py")


@pytest.mark.parametrize("error", [NameError, AttributeError, KeyError, TypeError])
@pytest.mark.parametrize("place", ["need", "torch.load", "zipfile.ZipFile", "ModelConfig"])
def test_errors_while_a_checkpoint_is_read_surface(tmp_path, monkeypatch, place, error):
    """A fault in the reading of a checkpoint is no damage of the file: "damaged" would send its
    author to look at the wrong end."""
    run, _, _ = stopped_run(tmp_path)

    def broken(*arguments, **more):
        raise error("in our own code")

    monkeypatch.setattr(f"model.{place}", broken)
    with pytest.raises(error, match="in our own code"):
        load_checkpoint(run.path("stage.last.pt"), "python sft.py")


@pytest.mark.parametrize("change", [dict(n_heads=4), dict(dropout=0.1)], ids=str)
def test_an_unknown_field_of_the_shape_surfaces(tmp_path, change):
    """Whoever takes a field out of ModelConfig, or misspells it, reads its name."""
    run, model, _ = stopped_run(tmp_path)
    path = run.path("stage.last.pt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model_config"] |= change
    torch.save(checkpoint, path)
    with pytest.raises(TypeError, match=str(*change)):
        load_checkpoint(path, "python sft.py")


def test_the_largest_seed(tmp_path):
    """The largest seed that is allowed seeds all the generators there are."""
    run = a_run(tmp_path, seed=2**64 - 1)
    torch.manual_seed(run.config.seed)
    assert 0 <= random_stream(run.config.seed, "a purpose").random() < 1


def test_errors_while_something_is_written_surface(tmp_path):
    """So does a fault in what makes the contents of a file: a full disk is not to blame for it."""
    def lines():
        yield "first\n"
        raise RecursionError("in our own code")

    with pytest.raises(RecursionError):
        with replacing(str(tmp_path / "a.txt")) as f:
            f.writelines(lines())
    assert not (tmp_path / "a.txt").exists()


# --------------------------------------------------------------------------------------------------
# Files

def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    """What is written takes its name at the end: until then, and after any error, the earlier file
    is there. Lines end with \\n on every system."""
    path = tmp_path / "a.txt"
    with replacing(str(path)) as f:
        f.write("ä 1\n")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), replacing(str(path)) as f:
        f.write("ä 2\n")
        1 / 0
    assert path.read_bytes() == "ä 1\n".encode()
    with replacing(str(path), "wb") as f:
        f.write(b"3\r\n")
        assert path.read_bytes() == "ä 1\n".encode()
    assert path.read_bytes() == b"3\r\n" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


class full_disk:
    """No file can grow beyond some bytes, as on a disk that is full."""

    def __init__(self, size):
        self.resource = pytest.importorskip("resource")
        self.size = size

    def __enter__(self):
        self.limits = self.resource.getrlimit(self.resource.RLIMIT_FSIZE)
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def __exit__(self, *error):
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, self.limits)


@pytest.mark.parametrize("size", [0, 1000, 99_000])
def test_a_full_disk_leaves_the_earlier_file(tmp_path, size):
    """What does not fit on the disk is told in one line, and the earlier file stays what it was."""
    path = str(tmp_path / "a.txt")
    with replacing(path) as f:
        f.write("first")

    def write_more():
        with full_disk(size), replacing(path) as f:
            for i in range(20_000):
                f.write(f"{i}\n")

    message = one_line(write_more)
    assert path in message and (tmp_path / "a.txt").read_text() == "first"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("size", [10, 5000, 10_000, 30_000, 60_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, size):
    """So it is with a checkpoint, wherever the disk is full."""
    run, model, _ = stopped_run(tmp_path)
    whole = (tmp_path / "stage.last.pt").read_bytes()
    assert len(whole) > size

    def save():
        with full_disk(size):
            run.save_last(True, model, 8)

    assert "stage.last.pt" in one_line(save)
    assert (tmp_path / "stage.last.pt").read_bytes() == whole and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="another process is made by fork here")
def test_one_stage_at_a_time(tmp_path):
    """While one process is at work in a folder another one is refused in a line that names it; it
    may work elsewhere, or when the first has ended. sample.py writes nothing that would matter."""
    def in_another_process(out_dir, config_class=StageConfig):
        process = os.fork()
        if process == 0:
            try:
                Run(config_class(out_dir=str(out_dir), device="cpu", dtype="float32"))
            except SystemExit as error:
                os._exit(7 if str(out_dir) in error.code and "\n" not in error.code else 8)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    out_dir = tmp_path / "new" / "out"
    run = a_run(out_dir)
    assert in_another_process(out_dir) == 7
    assert in_another_process(tmp_path / "other") == 0
    assert in_another_process(out_dir, CONFIGS["sample"]) == 0
    end(run)
    assert in_another_process(out_dir) == 0
    end(a_run(out_dir))  # that process has ended, and its lock with it


def test_need_names_the_command(tmp_path):
    """A file that is missing is named with the command that makes it."""
    path = str(tmp_path / "a.pt")
    assert one_line(need, path, "python sft.py") == f"no {path}: run python sft.py first"
    Path(path).write_text("")
    assert need(path, "python sft.py") == path


# --------------------------------------------------------------------------------------------------
# The log

def test_log(tmp_path, capsys):
    """A logged step is a line for people and the same as a line of JSON; only one process logs. The
    first line of a run holds its options."""
    run = a_run(tmp_path, rate=0.25)
    run.start()
    run.log(3, "step 3  loss 0.5", loss=0.5)
    run.main = False
    run.log(4, "step 4  loss 0.4", loss=0.4)
    first, last = read_lines(tmp_path / "log.jsonl")
    assert first["stage"] == "stage" and first["config"]["rate"] == 0.25
    assert last.pop("seconds") >= 0 and last == dict(stage="stage", step=3, loss=0.5)
    assert "step 3  loss 0.5\n" in capsys.readouterr().out


def test_a_resumed_run_logs_no_step_twice(tmp_path):
    """The steps after the checkpoint are taken out of the log when they are done again; what other
    stages have logged, and what belongs to no step, stays in its order."""
    lines = [dict(stage="stage", step=None, config={}), dict(stage="stage", step=7, loss=1.0),
             dict(stage="other", step=9), dict(stage="stage", step=8, loss=0.5),
             dict(stage="stage", step=None, scorecard="stage")]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    forget_steps_after(str(path), "stage", 7)
    assert read_lines(path) == lines[:3] + lines[4:]
    forget_steps_after(str(path), "other", 0)
    assert read_lines(path) == lines[:2] + lines[4:]


@pytest.mark.parametrize("text", [None, '{"stage": "stage", "step": 1}\n{"stage": "sta'])
def test_a_run_is_resumed_without_its_log(tmp_path, text):
    """A log that was thrown away, or whose last line was cut off, is no reason not to go on."""
    _, model, _ = stopped_run(tmp_path)
    path = tmp_path / "log.jsonl"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert a_run(tmp_path, resume=True).start(model=model)["step"] == 7
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
