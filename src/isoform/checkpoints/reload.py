"""What another program makes of an export: `python -m isoform.checkpoints.reload FOLDER`, in a process of its own.

It reads FOLDER/request.json and what that names, by transformers, peft or onnxruntime, no weight of ours in memory.
FOLDER/reply.safetensors gets an array for each call, FOLDER/reply.json the rest.

request: format; place, a folder; settings, fields of config.json that the loader must be told; calls, each a table
of input name -> rows of integers; texts to be encoded; output, what is wanted: class scores, hidden states or logits.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from isoform import storage

GGUF_FILE, ONNX_FILE = "model.gguf", "model.onnx"


def main(folder: Path) -> None:
    """Carries out the request."""
    from safetensors.numpy import save

    warnings.simplefilter("ignore")
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    read = _onnx if request["format"] == "onnx" else _transformers
    arrays, reply = read(Path(request["place"]), request)
    named = {str(number): array for number, array in enumerate(arrays)}
    storage.write_blocks(folder / "reply.safetensors", [save(named)])
    storage.write_json(folder / "reply.json", reply)


def _transformers(place: Path, request: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    import torch
    import transformers

    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if request["format"] == "gguf":
        where["gguf_file"] = GGUF_FILE
    whole = _base(place) if request["format"] == "peft" else place
    config = transformers.AutoConfig.from_pretrained(whole, **where)
    if request["settings"]:
        config = transformers.AutoConfig.for_model(**{**config.to_dict(), **request["settings"]})
    fallback = transformers.AutoModelForCausalLM if request["format"] == "gguf" else transformers.AutoModel
    cls = getattr(transformers, str(next(iter(config.architectures or []), None)), fallback)
    model = cls.from_pretrained(whole, config=config, dtype=torch.float32, use_safetensors=True, **where).eval()
    if request["format"] == "peft":
        import peft

        model = peft.PeftModel.from_pretrained(model, place).eval()
    arrays = []
    for call in request["calls"]:
        with torch.no_grad():
            output = model(**{name: torch.tensor(rows) for name, rows in call.items()}, output_hidden_states=True)
        scores = output.get("logits", output.get("prediction_logits"))
        hidden = output[0] if scores is None else output.get("hidden_states", [None])[-1]
        arrays.append((hidden if request["output"] == "hidden states" else scores).float().numpy())
    reply = {"reader": type(model).__name__, "id2label": getattr(config, "id2label", None)}
    reply["generation"] = model.generation_config.to_dict() if model.can_generate() else None
    if request["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **where)
        reply["ids"] = [tokenizer(text, add_special_tokens=False).input_ids for text in request["texts"]]
        roles = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")
        reply["special"] = {role: getattr(tokenizer, f"{role}_token_id") for role in roles}
        reply["chat_template"] = tokenizer.chat_template
    return arrays, reply


def _base(adapter: Path) -> Path:
    """Where the adapter's own config says that its base stands."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return Path(settings["base_model_name_or_path"])


def _onnx(place: Path, request: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    session = onnxruntime.InferenceSession(place / ONNX_FILE, providers=["CPUExecutionProvider"])
    arrays = [
        session.run(None, {name: np.array(rows, dtype=np.int64) for name, rows in call.items()})[0]
        for call in request["calls"]
    ]
    reply: dict[str, Any] = {"reader": "onnxruntime"}
    if request["texts"]:
        tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        reply["ids"] = [tokenizer.encode(text, add_special_tokens=False).ids for text in request["texts"]]
    return arrays, reply


if __name__ == "__main__":
    main(Path(sys.argv[1]))
