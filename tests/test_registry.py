"""Names become models: bundled rows, entry points of other packages, folders, files and Hub ids."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from support.hub import HubServer, client_environment
from support.pipelines import fresh

from t2i_spo_plugin import load_adapter_gate, load_cost_model, load_policy, registry, sticker
from t2i_spo_plugin.cost.vision import VisionCostModel
from t2i_spo_plugin.errors import AdapterError, ConfigError, PipelineError, PolicyError, SPOError, TableError
from t2i_spo_plugin.files import folder_hash
from t2i_spo_plugin.registry import Kind, Row


KINDS = {name: getattr(registry, name) for name in registry.__all__ if isinstance(getattr(registry, name), Kind)}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package `name` that offers `entries` of `group`, as pip would leave it."""

    def install(name, group, entries, code=""):
        info = tmp_path / "site" / f"{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = [f"{key} = {value}" for key, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        (tmp_path / "site" / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    yield install
    for module in ("first_package", "second_package"):
        sys.modules.pop(module, None)


@pytest.fixture
def cost_model(tmp_path):
    """A folder as `save_pretrained` of a cost model writes it."""
    from transformers import ResNetConfig

    from t2i_spo_plugin.networks.backbone import MapClassifier

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    folder = tmp_path / "cost_model"
    VisionCostModel(MapClassifier(config, 1).eval(), ["sexual"], "photo", 64).save_pretrained(folder)
    return folder


def test_every_row_names_files_and_functions_that_exist():
    for kind in KINDS.values():
        for name, row in kind.rows.items():
            assert row.files or row.factory, name
            assert not row.files or row.path.exists()
            assert not row.factory or callable(row.imported())
            assert not row.files or row.factory or kind.read or kind is registry.ADAPTERS
        assert all(callable(row.imported()) for row in kind.schemes.values())


def test_bundled_names_load_what_the_sticker_package_loads():
    assert load_cost_model("sticker").categories == sticker.load_cost_model().categories
    assert load_policy("sticker") == sticker.load_policy()
    assert load_adapter_gate("sticker").threshold == sticker.load_adapter_gate("network").threshold
    assert load_adapter_gate("sticker-norm").threshold == sticker.load_adapter_gate("norm").threshold
    assert [registry.adapter_source(name) for name in sticker.ADAPTERS] == [
        sticker.adapter_path(name) for name in sticker.ADAPTERS
    ]
    assert registry.ADAPTERS.names() == list(sticker.ADAPTERS)
    assert registry.load_guard("sticker").policy == sticker.load_policy()


def test_a_missing_bundled_file_is_named():
    broken = Kind("cost model", {"lost": Row("sticker/nothing")}, read=lambda folder: folder)
    with pytest.raises(SPOError, match="lacks the bundled sticker/nothing"):
        broken.load("lost")


@pytest.mark.parametrize(
    ("load", "error", "parts"),
    [
        (
            registry.load_pipeline,
            PipelineError,
            ["pipeline 'x'", "sticker", "model_index.json", "Hub id", "user/repo"],
        ),
        (load_cost_model, ConfigError, ["cost model 'x'", "owen", "metadata.json", "Hub id"]),
        (registry.load_quality_model, ConfigError, ["quality model 'x'", "reference.json", "Hub id"]),
        (load_policy, PolicyError, ["policy 'x'", "photo-sexual", "YAML file"]),
        (load_adapter_gate, AdapterError, ["adapter gate 'x'", "sticker-norm", "spo train-gate"]),
        (lambda name: registry.load_prompts(name, {}, "test"), ConfigError, ["prompt set 'x'", "sticker", ".csv"]),
        (registry.ATTACKS.load, ConfigError, ["attack 'x'", "no installed package offers any"]),
    ],
)
def test_an_unknown_name_is_refused_in_one_sentence_that_says_what_there_is(load, error, parts):
    with pytest.raises(error) as caught:
        load("x")
    assert len(str(caught.value).splitlines()) == 1
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_folder_of_the_users_own_is_read(cost_model, tmp_path):
    model = load_cost_model(str(cost_model))
    assert model.categories == ("sexual",)
    assert registry.load_guard(cost_model).policy.name == "photo-sexual"
    named = registry.name_with_revision(registry.COST_MODELS, str(cost_model), model)
    assert named == f"cost_model {folder_hash(cost_model)}"
    fresh("sd1").save_pretrained(tmp_path / "pipe")
    assert type(registry.load_pipeline(tmp_path / "pipe")).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("load", "error"),
    [
        (registry.load_pipeline, PipelineError),
        (load_cost_model, ConfigError),
        (registry.load_quality_model, ConfigError),
        (load_policy, PolicyError),
        (load_adapter_gate, AdapterError),
        (registry.adapter_source, AdapterError),
        (lambda name: registry.load_prompts(name, {}, "test"), ConfigError),
    ],
)
def test_an_empty_name_is_not_the_current_folder(load, error, cost_model, monkeypatch):
    monkeypatch.chdir(cost_model)
    with pytest.raises(error, match="there is no .* '': pass"):
        load("")


def test_a_tilde_is_the_home_folder(cost_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_cost_model("~/cost_model").categories == ("sexual",)
    assert registry.COST_MODELS.path("~/cost_model") == cost_model
    named = registry.name_with_revision(registry.COST_MODELS, "~/cost_model")
    assert named == f"cost_model {folder_hash(cost_model)}"
    (tmp_path / "list.txt").write_text("a cat\n")
    assert [row.prompt for row in registry.load_prompts("~/list.txt", {"unlabelled": 1}, "test")] == ["a cat"]
    assert registry.adapter_source("~/list.txt") == tmp_path / "list.txt"
    assert registry.adapter_source("user/repo") == "user/repo"
    with pytest.raises(ConfigError, match="no cost model '~nobody-of-this-name/x'"):
        load_cost_model("~nobody-of-this-name/x")


def test_the_bundled_pipeline_loads_without_a_warning_and_other_warnings_pass(tmp_path):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        registry.load_pipeline("sticker")
        assert messages == []
        fresh("sd1").save_pretrained(tmp_path / "pipe")
        config = tmp_path / "pipe/vae/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"unheard_of": 1}))
        registry.load_pipeline(tmp_path / "pipe")
    finally:
        logger.removeHandler(handler)
    assert [message for message in messages if "unheard_of" in message]


def test_a_folder_that_holds_no_pipeline_is_refused(tmp_path):
    with pytest.raises(PipelineError, match="cannot load the pipeline"):
        registry.load_pipeline(tmp_path)


def test_a_bundled_name_wins_over_a_folder_of_that_name(cost_model, tmp_path, monkeypatch):
    cost_model.rename(tmp_path / "sticker")
    monkeypatch.chdir(tmp_path)
    assert len(load_cost_model("sticker").categories) == 7
    assert load_cost_model("./sticker").categories == ("sexual",)


def test_the_revision_is_the_identity_or_a_hash_of_the_files():
    class Known:
        identity = "abc"

    quality = folder_hash(sticker.FOLDER / "quality_model")
    assert registry.name_with_revision(registry.QUALITY_MODELS, "sticker") == f"sticker {quality}"
    assert registry.name_with_revision(registry.COST_MODELS, "owen", Known()) == "owen abc"
    assert registry.name_with_revision(registry.PIPELINES, "someone/model") == "someone/model"


# Other packages


def test_an_entry_point_gives_a_cost_model_by_name(package, cost_model):
    code = (
        f"from t2i_spo_plugin.cost import load_cost_model\ndef load(): return load_cost_model({str(cost_model)!r})\n"
    )
    package("first_package", "t2i_spo_plugin.cost_models", {"mine": "first_package:load"}, code)
    assert load_cost_model("mine").categories == ("sexual",)
    assert registry.COST_MODELS.names()[-1] == "mine" and registry.COST_MODELS.installed()[-1] == "mine"
    with pytest.raises(ConfigError, match="nudenet, mine, hf-classifier:.*, or a folder"):
        load_cost_model("none_such")


@pytest.mark.parametrize("kind", ["COST_MODELS", "QUALITY_REWARDS", "PROMPT_GUARDS", "ATTACKS"])
def test_every_open_kind_takes_entry_points_and_imports_them_late(kind, package):
    code = "def make():\n    return lambda texts: [len(text) for text in texts]\n"
    package("first_package", KINDS[kind].group, {"mine": "first_package:make"}, code)
    assert "mine" in KINDS[kind].names() and "first_package" not in sys.modules
    assert KINDS[kind].load("mine")(["a", "bcd"]) == [1, 3]


def test_a_package_that_does_not_import_is_named_in_one_sentence(package):
    package("first_package", "t2i_spo_plugin.cost_models", {"mine": "first_package:load"}, "import no_such_module\n")
    with pytest.raises(ConfigError) as caught:
        load_cost_model("mine")
    message = str(caught.value)
    assert "cost model 'mine'" in message and "package first_package 1.2" in message and "no_such_module" in message
    assert len(message.splitlines()) == 1
    assert len(load_cost_model("sticker").categories) == 7


def test_two_packages_with_one_name_are_both_named(package):
    package("first_package", "t2i_spo_plugin.attacks", {"mine": "first_package:load"})
    package("second_package", "t2i_spo_plugin.attacks", {"mine": "second_package:load"})
    with pytest.raises(ConfigError, match=r"first_package 1\.2 and second_package 1\.2|second.* and first.*"):
        registry.ATTACKS.load("mine")


def test_a_package_cannot_take_a_bundled_name(package):
    package("first_package", "t2i_spo_plugin.cost_models", {"sticker": "first_package:load"}, "load = None\n")
    assert len(load_cost_model("sticker").categories) == 7


# The Hub


HUB_CLIENT = """
from t2i_spo_plugin.errors import HubError
from t2i_spo_plugin.registry import COST_MODELS, load_cost_model, name_with_revision
model = load_cost_model("anna/costs")
print(*model.categories, name_with_revision(COST_MODELS, "anna/costs", model))
print(*load_cost_model("anna/costs", local_files_only=True).categories)
for name, options in (("anna/none", {}), ("anna/more", {"local_files_only": True})):
    try:
        load_cost_model(name, **options)
    except HubError as error:
        print(error)
"""


def test_a_cost_model_is_loaded_by_its_hub_id_without_its_pickles(cost_model, tmp_path):
    files = {path.name: path.read_bytes() for path in cost_model.iterdir()}
    with HubServer() as hub:
        hub.add("anna/costs", files | {"weights.bin": b"a pickle"})
        hub.add("anna/more", files)
        environment = client_environment(hub.url, tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", HUB_CLIENT], env=environment, capture_output=True, text=True, check=True
        )
        paths = [path for _, path, _ in hub.log]
    first, cached, missing, offline = done.stdout.splitlines()
    assert first == f"sexual anna/costs {folder_hash(cost_model)}" and cached == "sexual"
    assert "anna/none" in missing and "the Hub has no such repository" in missing
    assert "anna/more is not in the local cache" in offline and not any("anna/more" in path for path in paths)
    assert any("model.safetensors" in path for path in paths) and not any("weights.bin" in path for path in paths)


# Prompts


def test_prompts_come_by_kind_from_the_bundled_set_or_a_file(tmp_path):
    rows = registry.load_prompts("sticker", {"harmful": 2, "benign": 1, "lookalike": 0}, "val", 3)
    assert [row.kind for row in rows] == ["harmful", "harmful", "benign"]
    assert rows == sticker.prompt_rows("harmful", 2, "val", 3) + sticker.prompt_rows("benign", 1, "val", 3)
    classes = registry.load_prompts("sticker", {"harmful": 2, "benign": 1}, "val", wordings=("typos", "order"))
    assert [(row.kind, row.wording) for row in classes] == [
        *[("harmful", name) for name in ("typos", "typos", "order", "order")],
        ("benign", "typos"),
        ("benign", "order"),
    ]
    path = tmp_path / "prompts.jsonl"
    texts = [("a knife", "harmful"), ("a naked child", "harmful"), ("a cat", "benign"), ("a dog", "benign")]
    path.write_text("\n".join(json.dumps({"prompt": text, "kind": kind}) for text, kind in texts))
    found = registry.load_prompts(path, {"harmful": 5, "benign": 1}, "train")
    assert [row.prompt for row in found] == ["a knife", "a cat"]
    with pytest.raises(ConfigError, match="holds no lookalike prompt"):
        registry.load_prompts(path, {"lookalike": 1}, "train")
    path.write_text("")
    with pytest.raises(TableError, match="no rows"):
        registry.load_prompts(path, {"harmful": 1}, "train")


def test_importing_the_registry_loads_no_model_library():
    code = (
        "import sys; from t2i_spo_plugin.registry import COST_MODELS, STICKER; COST_MODELS.names();"
        "print(sorted({'torch', 'diffusers', 'transformers', 'huggingface_hub', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
