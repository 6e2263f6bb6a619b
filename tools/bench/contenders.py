"""Each contender as a function that builds a model of a shape with random weights and returns what continues prompts.

A contender is called as `make(shape, dtype)` and returns `run(rows, new)`, which gives every row `new` more tokens,
greedily, whatever they are, and returns how many programs were compiled so far (`None` if nobody counts).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[list[list[int]], int], int | None]


def ours(shape: dict[str, Any], dtype: str) -> Run:
    from gemma2_keras import Gemma2Backbone, Gemma2CausalLM

    model = Gemma2CausalLM(Gemma2Backbone(**shape, dtype=dtype))
    model.compile(sampler="greedy")

    def run(rows: list[list[int]], new: int) -> int:
        model.generate(_padded(rows, new), stop_token_ids=None, max_new_tokens=new)
        return model.compilations

    return run


def keras_hub_backbone(shape: dict[str, Any], dtype: str) -> Any:
    import keras_hub

    return keras_hub.models.GemmaBackbone(
        **{**shape, "intermediate_dim": 2 * shape["intermediate_dim"]},
        query_head_dim_normalize=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        final_logit_soft_cap=30.0,
        attention_logit_soft_cap=50.0,
        use_sliding_window_attention=True,
        dtype=dtype,
    )


def keras_hub(shape: dict[str, Any], dtype: str) -> Run:
    import keras_hub

    backbone = keras_hub_backbone(shape, dtype)

    # Each trace calls this method once; on torch, which traces nothing, each call does.
    class Counting(keras_hub.models.GemmaCausalLM):
        traces = 0

        def generate_step(self, *arguments, **options):
            type(self).traces += 1
            return super().generate_step(*arguments, **options)

    model = Counting(backbone, preprocessor=None)
    model.compile(sampler="greedy")

    def run(rows: list[list[int]], new: int) -> int:
        np.asarray(model.generate(_padded(rows, new), stop_token_ids=None)["token_ids"])
        return Counting.traces

    return run


def transformers_model(shape: dict[str, Any], dtype: str, attention: str = "eager") -> Any:
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    options: dict[str, Any] = {"attn_implementation": attention}
    config = Gemma2Config(
        vocab_size=shape["vocabulary_size"],
        hidden_size=shape["hidden_dim"],
        num_hidden_layers=shape["num_layers"],
        intermediate_size=shape["intermediate_dim"],
        num_attention_heads=shape["num_query_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        sliding_window=shape["sliding_window_size"],
        query_pre_attn_scalar=shape["head_dim"],
        **options,
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    model = Gemma2ForCausalLM(config).eval()
    torch.set_default_dtype(usual)
    return model


def transformers(shape: dict[str, Any], dtype: str, attention: str = "eager", compiled: bool = False) -> Run:
    import torch

    model = transformers_model(shape, dtype, attention)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward)

    def run(rows: list[list[int]], new: int) -> None:
        width = max(map(len, rows))
        ids, mask = np.zeros((2, len(rows), width), "int64")
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        with torch.inference_mode():
            model.generate(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                max_new_tokens=new,
                min_new_tokens=new,
                **options,
            )

    return run


def llama_cpp(shape: dict[str, Any], dtype: str) -> Run:
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    if dtype != "bfloat16":
        raise ValueError("llama.cpp is timed with bfloat16 weights.")
    file = Path(tempfile.gettempdir(), f"gemma2-keras-bench-{shape['num_layers']}x{shape['hidden_dim']}.gguf")
    if not file.exists():
        _write_gguf(shape, file)
    threads = len(os.sched_getaffinity(0))
    model = Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(rows: list[list[int]], new: int) -> None:
        for row in rows:
            model.reset()
            model.eval(row)
            for i in range(new):
                token = model.sample(temp=0.0)
                # The last token is made and not run, as by the others.
                if i < new - 1:
                    model.eval([token])

    return run


CONTENDERS: dict[str, Callable[..., Run]] = {
    "gemma2_keras": ours,
    "keras_hub": keras_hub,
    "transformers": transformers,
    "transformers sdpa": lambda shape, dtype: transformers(shape, dtype, attention="sdpa"),
    "transformers compiled": lambda shape, dtype: transformers(shape, dtype, compiled=True),
    "llama.cpp": llama_cpp,
}


def _padded(rows: list[list[int]], new: int) -> dict[str, np.ndarray]:
    width = max(map(len, rows)) + new
    ids, mask = np.zeros((2, len(rows), width), "int32")
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"token_ids": ids, "padding_mask": mask}


def _write_gguf(shape: dict[str, Any], file: Path) -> None:
    """A GGUF file of random bfloat16 weights with a vocabulary of made-up words."""
    import gguf  # pyright: ignore[reportMissingImports]

    vocabulary, width = shape["vocabulary_size"], shape["hidden_dim"]
    hidden, size = shape["intermediate_dim"], shape["head_dim"]
    queries, keys = shape["num_query_heads"] * size, shape["num_key_value_heads"] * size
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "gemma2")
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(shape["num_layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(shape["num_query_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(shape["sliding_window_size"])
    kinds = gguf.TokenType
    special = [("<pad>", kinds.CONTROL), ("<eos>", kinds.CONTROL), ("<bos>", kinds.CONTROL), ("<unk>", kinds.UNKNOWN)]
    pieces = [*special, *((f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256))]
    pieces += [(f"word{i}", kinds.NORMAL) for i in range(vocabulary - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([-float(i) for i in range(vocabulary)])
    writer.add_token_types([kind for _, kind in pieces])
    for name, token in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(token)
    draw = np.random.default_rng(0)

    def matrix(name: str, *dimensions: int) -> None:
        # The upper half of a float32 is a bfloat16.
        numbers = draw.standard_normal(dimensions, dtype="float32") * 0.02
        halves = (numbers.view("uint32") >> 16).astype("uint16")
        writer.add_tensor(name, halves.view("uint8"), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(width, "float32"))

    matrix("token_embd.weight", vocabulary, width)
    for layer in range(shape["num_layers"]):
        block = f"blk.{layer}."
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            norm(f"{block}{name}.weight")
        for name, rows, columns in (
            ("attn_q", queries, width),
            ("attn_k", keys, width),
            ("attn_v", keys, width),
            ("attn_output", width, queries),
            ("ffn_gate", hidden, width),
            ("ffn_up", hidden, width),
            ("ffn_down", width, hidden),
        ):
            matrix(f"{block}{name}.weight", rows, columns)
    norm("output_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(file)
