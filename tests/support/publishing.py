"""What the tests of publishing share: names of the test Hub, a dry run, and a client in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from t2i_spo_plugin.hub import ModelCardInfo, Published, publish_adapter

from .hub import HubServer, client_environment


TOKEN = "hf_" + "w" * 30
READ_TOKEN = "hf_" + "r" * 30
REPO, BASE, DATASET = "anna/safe-sd1", "someone/base", "anna/prompts"


def dry_run(adapter: Any, out: Path | None, token: str | None = None, pipe: Any = None, **card: Any) -> Published:
    """What would be published as `REPO`; `card` are fields of `ModelCardInfo`."""
    info = ModelCardInfo(**({"base_model": BASE, "license": "mit"} | card))
    return publish_adapter(adapter, REPO, info, token=token, pipe=pipe, dry_run=True, out=out)


DRIVER = """
import contextlib, functools, io, json, sys, time
from t2i_spo_plugin import cli
from t2i_spo_plugin.adapters import download_adapter
from t2i_spo_plugin.hub import ModelCardInfo, publish_adapter

time.sleep = lambda seconds: None  # the client waits before it tries again
steps, answers = json.loads(sys.argv[1]), {}


@functools.cache
def pipeline():  # diffusers takes seconds to import, and only some steps need it
    from support.pipelines import fresh

    return fresh("sd1")


def image():
    from support.pipelines import draw

    return draw(pipeline()).images.tolist()


def run(kind, options):
    if kind == "publish":
        with_pipe = {"pipe": pipeline()} if options.pop("with_pipe", False) else {}
        published = publish_adapter(card=ModelCardInfo(**options.pop("card")), **options, **with_pipe)
        return {"commit": published.commit, "url": published.url, "text": str(published)}
    if kind == "command":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            return {"code": cli.main(options["words"]), "text": printed.getvalue()}
    if kind == "download":
        return {"path": str(download_adapter(**options))}
    if kind == "diffusers":
        pipe = pipeline()
        pipe.load_lora_weights(**options, adapter_name="plain")
        generated = image()
        pipe.unload_lora_weights()
        return {"image": generated}
    from t2i_spo_plugin.pipelines import load_spo_lora, unload_spo_lora

    load_spo_lora(pipeline(), **options)
    generated = image()
    unload_spo_lora(pipeline())
    return {"image": generated}


for name, kind, options in steps:
    try:
        answers[name] = run(kind, options)
    except Exception as error:
        answers[name] = {"error": type(error).__name__, "message": str(error)}
with open(sys.argv[2], "w") as file:
    json.dump(answers, file)
"""


def run_client(hub: HubServer, home: Path, steps: list[tuple[str, str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The answer to each step (name, kind, options) of a process that knows `hub` and keeps its cache in `home`.

    Kinds are `publish` (options of `publish_adapter`), `download` (of `download_adapter`), `load` (of
    `load_spo_lora`), `diffusers` (of `load_lora_weights`) and `command` (words). An error is an answer too.
    """
    out = home.with_name(f"{home.name}.json")
    command = [sys.executable, "-c", DRIVER, json.dumps(steps), str(out)]
    environment = client_environment(hub.url, home)
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    answers: dict[str, dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return answers
