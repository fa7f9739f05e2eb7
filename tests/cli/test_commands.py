"""The command line: options from YAML and dataclass, plain sentences for errors, files in and out."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.pipelines import fresh, random_adapter
from transformers import ResNetConfig

from t2i_spo_plugin import cli
from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, write_adapter
from t2i_spo_plugin.cli.commands import COMMANDS, GROUPS
from t2i_spo_plugin.cli.demo import DemoConfig
from t2i_spo_plugin.cost.vision import VisionCostModel
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.eval import EvalConfig
from t2i_spo_plugin.gating import AdapterGate, save_adapter_gate
from t2i_spo_plugin.networks.backbone import MapClassifier
from t2i_spo_plugin.options import find_config, read_options
from t2i_spo_plugin.registry import load_policy
from t2i_spo_plugin.training import GateConfig, PairConfig, TrainConfig
from t2i_spo_plugin.training.objectives import OBJECTIVE_OPTIONS, DPOOptions, SPOOptions
from t2i_spo_plugin.training.objectives.terms import SFTTermOptions, TermOptions


@dataclass(frozen=True)
class Options:
    """A few options.

    Attributes:
        target: the place
            one goes to.
        steps: how many; and how fast.
        rate: how fast.
        lambda_: a weight.
        mark: a text.
        names: of things.
    """

    target: str
    steps: int = 3
    rate: float = 0.5
    lambda_: float = 1.0
    mark: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_is_read_and_the_command_line_wins(tmp_path):
    config = write(tmp_path / "a.yaml", "target: there\nsteps: 7\nrate: 1e-4\nnames: [a, b]\n")
    parsed = read_options(Options, ["--config", config, "--steps", "9", "--lambda", "2"], "spo x")
    assert parsed == Options("there", steps=9, rate=1e-4, lambda_=2.0, names=("a", "b"))
    assert read_options(Options, [f"--config={config}"], "spo x").steps == 7


def test_a_required_option_may_come_from_either_side_but_must_come(tmp_path, capsys):
    config = write(tmp_path / "a.yaml", "steps: 7\n")
    assert read_options(Options, ["--config", config, "--target", "t"], "spo x") == Options("t", steps=7)
    with pytest.raises(SystemExit) as stop:
        read_options(Options, ["--config", config], "spo x")
    assert stop.value.code == 2
    assert "--target" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 7\n", "unknown stepz; did you mean steps"),
        ("lambda_: 7\n", "unknown lambda_; did you mean lambda"),
        ("- 1\n", "expected a mapping"),
        ("a: [\n", "not a YAML file"),
        ("target: t\nrate: fast\n", "rate must be a number"),
        ("target: t\nsteps: 0\n", "steps must be at least 1"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_options(Options, ["--config", write(tmp_path / "a.yaml", text)], "spo x")


def test_a_missing_config_names_what_is_bundled():
    with pytest.raises(ConfigError, match="bundled are"):
        find_config("no-such-thing", TrainConfig)
    with pytest.raises(ConfigError, match="needs a file"):
        read_options(Options, ["--config"], "spo x")


def test_help_explains_every_option_from_the_docstring(capsys):
    with pytest.raises(SystemExit) as stop:
        read_options(Options, ["--help"], "spo x")
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for expected in ("the place one goes to", "how many; and how fast", "--lambda", "a text"):
        assert expected in printed


def test_the_training_options_are_those_of_the_python_api():
    args = ["--pairs", "p", "--output-dir", "o", "--objective.lambda", "0.5", "--terms.sft.weight", "3"]
    expected = TrainConfig(
        pairs="p", output_dir="o", objective=SPOOptions(lambda_=0.5), terms=TermOptions(sft=SFTTermOptions(3.0))
    )
    assert read_options(TrainConfig, args, "spo train") == expected


def test_an_objective_is_chosen_by_name_and_keeps_the_options_of_the_file_that_it_has(tmp_path):
    text = "pairs: p\noutput_dir: o\nobjective: {name: spo, beta: 500, lambda: 2}\n"
    config = write(tmp_path / "a.yaml", text)
    chosen = read_options(TrainConfig, ["--config", config, "--objective", "dpo"], "spo train")
    assert chosen.objective == DPOOptions(beta=500.0)
    changed = read_options(TrainConfig, ["--config", config, "--objective.lambda=1"], "spo train")
    assert changed.objective == SPOOptions(beta=500.0, lambda_=1.0)
    with pytest.raises(ConfigError, match="--objective must be one of dpo, spo, sft"):
        read_options(TrainConfig, ["--config", config, "--objective", "ppo"], "spo train")


def test_bundled_configurations_are_known_by_name():
    by_name = read_options(TrainConfig, ["--config", "sticker-spo", "--steps", "500"], "spo train")
    assert by_name == TrainConfig.from_yaml("sticker-spo.yaml", steps=500)


@pytest.mark.parametrize("kind", [PairConfig, TrainConfig, GateConfig, EvalConfig, DemoConfig])
def test_every_option_of_every_command_is_explained(kind):
    kinds = [kind, *OBJECTIVE_OPTIONS.values()]
    while kinds:
        own = kinds.pop()
        for field in dataclasses.fields(own):
            assert f"\n        {field.name}: " in own.__doc__, f"{own.__name__}.{field.name}"
            value = field.default_factory() if callable(field.default_factory) else None
            kinds += [type(value)] if dataclasses.is_dataclass(value) else []


def test_help_is_printed_without_loading_torch():
    code = "import sys; from t2i_spo_plugin.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_help_lists_every_command_once_in_its_group(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    first, second = capsys.readouterr().out.split("usage:")[1:]
    assert first == second
    groups = [block.splitlines() for block in first.split("\n\n") if block.splitlines()[0].endswith(":")]
    assert {head.rstrip(":"): [line.split()[0] for line in lines] for head, *lines in groups} == {
        group: list(commands) for group, commands in GROUPS.items()
    }
    assert sum(map(len, GROUPS.values())) == len(COMMANDS)


def test_generate_needs_no_training_package(tmp_path):
    code = (
        "import sys; from t2i_spo_plugin.cli import main\n"
        f"main(['generate', '--prompts', 'a cat', '--pipeline', {str(tmp_path)!r}])\n"
        "print([name for name in sys.modules if name.startswith(('t2i_spo_plugin.training', 't2i_spo_plugin.eval'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot load the pipeline" in done.stderr and done.stdout.strip() == "[]"


def test_errors_are_one_sentence_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "t2i_spo_plugin", "inspect", str(tmp_path / "none.safetensors")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("spo: ") and len(done.stderr.splitlines()) == 1
    assert cli.main(["nonsense"]) == 2


def test_inspect_says_what_an_adapter_is(tmp_path, capsys):
    pair = LoraPair(torch.randn(4, 8), torch.randn(16, 4), 2.0)
    metadata = AdapterMetadata("stable-diffusion-v1", "epsilon", "No knives", {"objective": "spo"})
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    write_adapter(Adapter({name: pair}, metadata), tmp_path / "a.safetensors")
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    printed = capsys.readouterr().out
    for expected in ("No knives", "stable-diffusion-v1", "epsilon", "1 in unet", "alpha / rank 0.5", "spo", "kohya"):
        assert expected in printed


@pytest.fixture(scope="module")
def cost_model(tmp_path_factory):
    torch.manual_seed(0)
    names = [category.name for category in load_policy("sticker").categories]
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    network = MapClassifier(config, len(names)).eval()
    folder = tmp_path_factory.mktemp("cost_model")
    VisionCostModel(network, names, "sticker", 64).save_pretrained(folder)
    return ["--cost-model", str(folder)]


def test_score_without_a_domain_asks_for_one(tmp_path, capsys, cost_model):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    assert cli.main(["score", str(tmp_path / "a.png"), *cost_model]) == 2
    assert "--domain sticker" in capsys.readouterr().err
    assert cli.main(["score", "--domain", "photo", str(tmp_path / "a.png"), *cost_model]) == 2
    assert "not for 'photo'" in capsys.readouterr().err
    assert cli.main(["score", "--override-domain", str(tmp_path / "a.png"), *cost_model]) == 0


def test_score_prints_costs_and_never_passes_over_a_broken_image(tmp_path, capsys, cost_model):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    options = ["--domain", "sticker", "--overlays", str(tmp_path / "seen"), *cost_model]
    assert cli.main(["score", *paths, *options]) == 2
    printed = capsys.readouterr()
    assert f"{paths[0]}: cost 0." in printed.out and "weapons" in printed.out
    assert f"{paths[1]}: not scored" in printed.out and f"{paths[2]}: not scored" in printed.out
    assert "2 of 3 images were not scored" in printed.err
    assert [path.name for path in (tmp_path / "seen").iterdir()] == ["0000-a-overlay.png"]


def test_generate_refuses_what_it_cannot_do(tmp_path, capsys):
    assert cli.main(["generate", "--prompts", "--out", str(tmp_path)]) == 2
    assert "at least one prompt" in capsys.readouterr().err
    assert cli.main(["generate", "--prompts", "a cat", "--pipeline", str(tmp_path / "none")]) == 2
    assert "there is no pipeline" in capsys.readouterr().err
    assert cli.main(["generate", "--prompts", "a cat", "list.txt", "--out", str(tmp_path)]) == 2
    assert "list.txt is a file of prompts" in capsys.readouterr().err
    assert cli.main(["generate", "--prompts", "upper.CSV", "--out", str(tmp_path)]) == 2
    assert "cannot read upper.CSV" in capsys.readouterr().err


def test_generate_applies_an_adapter_and_claims_no_score_without_a_cost_model(tmp_path, capsys):
    pipe = fresh("sd1")
    pipe.save_pretrained(tmp_path / "pipe")
    adapter = write_adapter(random_adapter(pipe), tmp_path / "a.safetensors")
    generated = {}
    never = save_adapter_gate(AdapterGate(1e9), tmp_path / "never.safetensors")
    ways = {"base": [], "zero": ["--strength", "0"], "full": [], "never": ["--adapter-gate", str(never)]}
    for name, more in ways.items():
        options = ["--pipeline", str(tmp_path / "pipe"), "--steps", "2", "--out", str(tmp_path / name), *more]
        options += ["--adapter", str(adapter)] if name != "base" else []
        assert cli.main(["generate", "--prompts", "a sunny street", *options]) == 0
        printed = capsys.readouterr().out
        assert "not scored: no bundled cost model knows photo images" in printed
        (path,) = (tmp_path / name).rglob("*.png")
        assert str(path) in printed
        generated[name] = path.read_bytes()
    assert generated["zero"] == generated["never"] == generated["base"] != generated["full"]
    assert cli.main(["generate", "--prompts", "a street", "--adapter-gate", str(never), *options[:2]]) == 2
    assert "--adapter-gate gates one adapter, 0 are named" in capsys.readouterr().err


def test_generate_refuses_images_of_the_adapter_that_was_there_before(tmp_path, capsys):
    pipe = fresh("sd1")
    pipe.save_pretrained(tmp_path / "pipe")
    adapter = write_adapter(random_adapter(pipe), tmp_path / "a.safetensors")

    def generate(adapter):
        options = ["--pipeline", str(tmp_path / "pipe"), "--steps", "1", "--out", str(tmp_path / "out")]
        return cli.main(["generate", "--prompts", "a sunny street", *options, "--adapter", str(adapter)])

    assert generate(adapter) == 0
    (image,) = (tmp_path / "out").rglob("*.png")
    before = image.stat().st_mtime_ns, image.read_bytes()
    assert generate(adapter.rename(tmp_path / "renamed.safetensors")) == 0
    write_adapter(random_adapter(pipe, seed=1), adapter)
    capsys.readouterr()
    assert generate(adapter) == 2
    said = capsys.readouterr().err
    assert re.search(r"holds images of other settings \(pipeline.weights.adapters: \w{16} there, \w{16} now\)", said)
    assert before == (image.stat().st_mtime_ns, image.read_bytes())


def test_generate_applies_several_adapters_each_at_its_strength(tmp_path):
    pipe = fresh("sd1")
    pipe.save_pretrained(tmp_path / "pipe")
    files = [write_adapter(random_adapter(pipe, seed=seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    cases = {
        "one": [str(files[0])],
        "both": [str(files[0]), f"{files[1]}@0.5"],
        "turned": [f"{files[1]}@0.5", str(files[0])],
        "off": [str(files[0]), f"{files[1]}@0"],
    }
    generated = {}
    for name, adapters in cases.items():
        options = [word for adapter in adapters for word in ("--adapter", adapter)]
        options += ["--pipeline", str(tmp_path / "pipe"), "--steps", "2", "--out", str(tmp_path / name)]
        assert cli.main(["generate", "--prompts", "a sunny street", *options]) == 0
        generated[name] = next((tmp_path / name).rglob("*.png")).read_bytes()
    assert generated["both"] == generated["turned"] != generated["one"] == generated["off"]
