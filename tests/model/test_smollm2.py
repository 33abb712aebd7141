"""A real trained model, SmolLM2-135M-Instruct in 4 bits, against transformers on what that holds.

`./launch.sh model smollm2` fetches it; where it has not been fetched, these tests skip.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from shardlens import LanguageModel, Sampling
from shardlens.model import GgufFile, ModelFiles, load_model, packaged_path

pytestmark = pytest.mark.slow

try:
    PATH = packaged_path("smollm2")
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)
PROMPT = "The capital of France is"
CONVERSATION = [{"role": "user", "content": "What is the capital of Italy?"}]
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def hf() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state: dict[str, Tensor] = {}
    for tensor in GGUFReader(str(PATH)).tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        _, _, name = tensor.name.partition("blk.")
        if not name:
            top = {"token_embd": "embed_tokens", "output_norm": "norm"}[tensor.name.split(".")[0]]
            state[f"model.{top}.weight"] = values
            continue
        layer, part, _ = name.split(".")
        heads = {"attn_q": 9, "attn_k": 3}.get(part)
        if heads:  # two halves of a head, interleaved
            values = values.view(heads, 32, 2, 576).transpose(1, 2).reshape(values.shape)
        state[f"model.layers.{layer}.{NAMES[part]}.weight"] = values
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def our_model(parallel: Any) -> LanguageModel:
    files = ModelFiles(PATH)
    model = load_model(files, parallel=parallel, dtype=torch.float32, device="cpu")
    return LanguageModel(model, files.tokenizer())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@torch.no_grad()
def test_text_and_lens_are_those_of_transformers(hf: Any, ranks: int, run_ranks: Any) -> None:
    def body(parallel: Any) -> Any:
        lm = our_model(parallel)
        ids = lm.tokenizer.encode(PROMPT)
        result = lm.generate(PROMPT, max_new_tokens=24, sampling=Sampling(), stop_ids=())
        return ids, result.token_ids, lm.lens(PROMPT, layers="all", top_k=5)

    ids, new_ids, trace = run_ranks(ranks, body)[0]
    assert ids == [504, 3575, 282, 4649, 314]
    tokens = torch.tensor([ids])
    expected = hf.generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert new_ids == expected[0, len(ids) :].tolist()
    out = hf(tokens, output_hidden_states=True)
    # the last of transformers' states is already normed
    states = torch.stack(
        [*(hf.model.norm(h) for h in out.hidden_states[:-1]), out.hidden_states[-1]]
    )
    logprobs = hf.lm_head(states).log_softmax(-1)[1:, 0].transpose(0, 1)  # [T, L, V]
    best = logprobs.topk(5)
    assert trace.logprobs.shape == (5, 30, 5)
    torch.testing.assert_close(trace.logprobs, best.values, rtol=0, atol=2e-3)
    assert (trace.token_ids == best.indices).float().mean() > 0.995


def test_its_chat_template(hf: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    files = ModelFiles(PATH)
    tokenizer = files.tokenizer()
    source = GgufFile(PATH).metadata["tokenizer.chat_template"]
    texts, _ = render_jinja_template(
        [CONVERSATION], chat_template=source, add_generation_prompt=True, bos_token="<|im_start|>"
    )
    ids = tokenizer.chat(CONVERSATION)
    assert tokenizer.decode(ids, skip_special=False) == texts[0]
    assert ids == tokenizer.encode(texts[0])
    assert ids[0] == 1 and tokenizer.eos_id == 2


def test_digits_are_split_apart() -> None:
    """As the published tokenizer does, which the file only names: "smollm"."""
    tokenizer = ModelFiles(PATH).tokenizer()
    assert tokenizer.encode("x  12") == [104, 256, 33, 34]
