"""Trains `nbattn.models.sasrec` in a few minutes: ``python -m nbattn.models.train.sasrec``.

Each epoch reads one stretch of every user's films, cut out at random, and predicts each next film among all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..sasrec import (
    DATASET,
    MEASURES,
    TRAIN,
    Films,
    held_out,
    measured,
    padded,
    popularity,
    read_films,
    weight_file,
)

D, HEADS, LAYERS, HIDDEN, LENGTH = 64, 2, 2, 64, 100
DROPOUT, RATE, BATCH, EPOCHS = 0.3, 2e-3, 32, 50
EVERY, PATIENCE = 5, 15
"""How often, and for how many epochs without a better one, the last films but one are looked at."""


def network(films: int, d: int = D, heads: int = HEADS, length: int = LENGTH) -> Any:
    """The model in PyTorch: films and places ``(B, S)`` to states ``(B, S, d)``."""
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.films, self.places = nn.Embedding(films, d), nn.Embedding(length, d)
            for table in (self.films, self.places):
                nn.init.normal_(table.weight, std=1 / math.sqrt(d))
            self.dropout = nn.Dropout(DROPOUT)
            layer = nn.TransformerEncoderLayer(d, heads, HIDDEN, DROPOUT, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(d), enable_nested_tensor=False)

        def forward(self, films: Any, places: Any) -> Any:
            x = self.dropout(self.films(films) * math.sqrt(d) + self.places(places))
            causal = nn.Transformer.generate_square_subsequent_mask(films.shape[1])
            return self.encoder(x, causal, is_causal=True)

    return Network()


def train(films: Films, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights that were best on each user's last film but one, and what led to them."""
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import trange

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = network(len(films.titles))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def states(histories: Any) -> tuple[Any, Any]:
        read, places, last = padded(histories, LENGTH)
        return model(torch.from_numpy(read), torch.from_numpy(places)), last

    def score(histories: Any) -> Any:
        with torch.no_grad():
            x, last = states(histories)
            return (x[range(len(x)), last] @ model.films.weight.T).numpy()

    best, kept = {"epoch": 0, MEASURES[1]: 0.0}, {}
    with trange(1, EPOCHS + 1, unit="epoch") as bar:
        for epoch in bar:
            model.train()
            stretches = [stretch(history[:-2], rng) for history in films.histories]
            order = rng.permutation(len(stretches))
            for i in range(0, len(order), BATCH):
                batch = [stretches[j] for j in order[i : i + BATCH]]
                x, last = states([films[:-1] for films in batch])
                known = torch.from_numpy(np.arange(x.shape[1]) <= last[:, None])
                targets = torch.from_numpy(np.concatenate([films[1:] for films in batch]))
                loss = cross_entropy(x[known] @ model.films.weight.T, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if epoch % EVERY and epoch < EPOCHS:
                continue
            model.eval()
            found = held_out(score, films, last=2)
            if found[MEASURES[1]] > best[MEASURES[1]]:
                best = {"epoch": epoch, **found}
                kept = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
            bar.set_postfix({name: f"{value:.3g}" for name, value in best.items()})
            if epoch - best["epoch"] >= PATIENCE:
                break
    model.load_state_dict({name: torch.from_numpy(array) for name, array in kept.items()})
    metrics = {"SASRec": held_out(score, films), "popularity": held_out(popularity(films), films)}
    config = {
        "dataset": DATASET,
        "seed": seed,
        "layers": LAYERS,
        "heads": HEADS,
        "chosen": best,
        "metrics": metrics,
    }
    return kept, config


def stretch(history: Any, rng: np.random.Generator) -> Any:
    """At most so many films in a row that all but the last fill the model."""
    end = rng.integers(min(LENGTH + 1, len(history)), len(history), endpoint=True)
    return history[max(0, end - LENGTH - 1) : end]


def save(path: Path, config: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, config=np.array(json.dumps(config)), **arrays)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main() -> int:
    """Train, measure on the films held out, save; 0, 2 after one sentence on stderr, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=TRAIN, description="Train the recommender of nbattn recommend.")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--weights", metavar="DIR", help="where the file goes; default: the user's cache")
    args = parser.parse_args()
    try:
        path, films = weight_file(args.weights), read_films()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # complains now rather than after minutes
            pass
        arrays, config = train(films, args.seed)
        save(path, config, arrays)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError) as error:
        hint = '; pip install "nbattn[train]"' if getattr(error, "name", "") in ("torch", "tqdm") else ""
        print(f"nbattn: error: {error}{hint}", file=sys.stderr)
        return 2
    print(f"{path}\n{measured(config['metrics'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
