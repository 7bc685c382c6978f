"""A plain GPT in PyTorch, as people write it: pre-norm blocks, fused attention, tied output, AdamW, random windows.

It takes its weights from a GPT-2 folder, so that two programs may start from the same model.
Source: Radford et al. 2019; the settings are those of nanoGPT's `train_shakespeare_char`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.attn_proj = nn.Linear(width, width, bias=bias)
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.mlp_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        states = self.c_attn(self.ln_1(x)).split(d, dim=2)
        query, key, value = (each.view(b, t, self.heads, d // self.heads).transpose(1, 2) for each in states)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=rate)
        mixed = mixed.transpose(1, 2).reshape(b, t, d)  # (b, h, t, k) -> (b, t, d)
        x = x + F.dropout(self.attn_proj(mixed), rate, self.training)
        inner = self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))
        return x + F.dropout(inner, rate, self.training)


class PlainGPT(nn.Module):
    """Token and position tables, blocks, a last norm, and an output layer: the token table once more where tied."""

    def __init__(
        self,
        vocab: int,
        positions: int,
        layers: int,
        heads: int,
        width: int,
        bias: bool,
        dropout: float,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, bias, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=bias)
        self.lm_head = None if tied else nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats a token that is asked, its target not being -100; tokens and targets `(b, t)`."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight if self.lm_head is None else self.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Reads a GPT-2 folder; its matrices stand the other way round. What a bias-free model has as zeros is left."""
        theirs = {name.removeprefix("transformer."): value for name, value in _tensors(folder).items()}
        places = {"attn.c_attn": "c_attn", "attn.c_proj": "attn_proj", "mlp.c_fc": "c_fc", "mlp.c_proj": "mlp_proj"}
        for name, parameter in self.named_parameters():
            source = name.replace("blocks.", "h.")
            turned = False
            for theirs_part, part in places.items():
                if f".{part}." in name:
                    source, turned = source.replace(part, theirs_part), name.endswith("weight")
            value = theirs[source]
            parameter.copy_(value.T if turned else value)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """Decay 0.1 on matrices and tables, none on vectors; fused, as nanoGPT has it where torch offers it."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)


def muon(model: PlainGPT, rate: float, adamw_rate: float, beta2: float) -> list[torch.optim.Optimizer]:
    """torch's Muon on the matrices of blocks, AdamW on everything else."""
    hidden = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if not any(parameter is other for other in hidden)]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=adamw_rate, betas=(0.9, beta2), weight_decay=0.0, fused=True),
    ]


def windows(data: Tensor, batch: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """`batch` windows of the text at random places, and the same one character later."""
    starts = torch.randint(len(data) - length, (batch,), generator=draw).tolist()
    tokens = torch.stack([data[start : start + length] for start in starts])
    return tokens, torch.stack([data[start + 1 : start + 1 + length] for start in starts])


@torch.no_grad()
def mean_loss(model: PlainGPT, data: Tensor, length: int, batch: int = 64) -> float:
    """Mean nats a token of every token but the first, in windows end to end; the model is in training mode again."""
    model.eval()
    asked = (len(data) - 1) // length * length
    tokens, targets = data[:asked].view(-1, length), data[1 : asked + 1].view(-1, length)
    parts = [(tokens[at : at + batch], targets[at : at + batch]) for at in range(0, len(tokens), batch)]
    if asked < len(data) - 1:
        parts.append((data[None, asked:-1], data[None, asked + 1 :]))
    total = sum(float(model(*part)) * part[1].numel() for part in parts)
    model.train()
    return total / (len(data) - 1)
