"""The flags that all commands with a model or a prompt share: revisions, adapters, forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import shardlens
from shardlens.cli import build_parser, main
from shardlens.model import DEMO

VERBS = [["lens"], ["generate"], ["steer", "extract"], ["steer", "generate"], ["steer", "eval"]]
NEEDED = {
    "lens": ["--prompt", "a"],
    "generate": ["--prompt", "a"],
    "steer extract": ["--pairs", "p", "--out", "o"],
    "steer generate": ["--prompt", "a", "--vector", "v"],
    "steer eval": ["--pairs", "p"],
}


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_command_takes_the_flags(verb: list[str]) -> None:
    given = ["--revision", "main", "--adapter", "a", "--plain", "--chat", "--system", "Be brief."]
    more = ["--template", "tools=[1]", "--template", "date_string=01 Jan 2025"]
    words = [*verb, "hub/id", *NEEDED[" ".join(verb)], *given, *more]
    arguments = build_parser(verb[0]).parse_args(words)
    assert (arguments.revision, arguments.adapter) == ("main", Path("a"))
    assert arguments.plain and arguments.chat and arguments.system == "Be brief."
    assert arguments.template == [("tools", [1]), ("date_string", "01 Jan 2025")]


def test_plan_takes_a_revision_and_no_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "hub/id", "--ranks", "1", "--context", "8"]
    assert build_parser("plan").parse_args([*words, "--revision", "main"]).revision == "main"
    assert main([*words, "--adapter", "a"]) == 2
    assert "--adapter" in capsys.readouterr().err


def test_a_revision_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the commands, of the hub, for the id that is given."""
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def fetch(hub_id: str, *names: str, revision: str | None = None, **options: Any) -> str:
        asked.append((hub_id, revision))
        return str(DEMO / names[0]) if names else str(DEMO)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    words = ["org/model", "--revision", "v2"]
    assert main(["generate", *words, "--prompt", "Anna is", "--max-new-tokens", "1"]) == 0
    assert main(["plan", *words, "--ranks", "1", "--context", "8"]) == 0
    assert len(asked) >= 3 and set(asked) == {("org/model", "v2")}


def test_an_adapter_is_added(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name, d = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight", 128
    tensors = {name.format("A"): torch.randn(2, d), name.format("B"): torch.randn(d, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    texts = []
    for more in ([], ["--adapter", str(tmp_path)]):
        out = tmp_path / "out.json"
        words = ["generate", "demo", "--prompt", "Anna is", "--max-new-tokens", "12", *more]
        assert main([*words, "--json", str(out)]) == 0
        texts.append(json.loads(out.read_text())["text"])
    adapted = shardlens.load("demo", adapter=tmp_path).generate("Anna is", max_new_tokens=12)
    assert texts[1] == adapted.text != texts[0]
