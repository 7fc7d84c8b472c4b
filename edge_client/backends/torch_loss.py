"""Cross-entropy at the targets of a batch, without ever holding all of their logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edge_client.data.batches import Batch
from oneround.errors import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 22  # elements that are held of a batch's logits: 16 MiB in float32


class TargetLoss:
    """Runs a causal language model's body on whole batches, and its head on the targets only, a chunk at a time.

    The head is the model itself with its body taken out, so that whatever it does to make logits of hidden states (tied
    weights, scaling, soft caps) stays its own business.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes the body out of the model.

        Raises:
            BadModel: it has none.
        """
        if model.base_model is model:
            raise BadModel(f"{type(model).__name__} has no body apart from its head, so it cannot be trained here")
        self.body = model.base_model
        self._body_output = _BodyOutput()
        setattr(model, model.base_model_prefix, self._body_output)
        self._model = model

    def backward(self, batch: Batch, count: int) -> torch.Tensor:
        """Σ cross-entropy / `count` over the batch's targets, float32; its gradients are added to the parameters'."""
        device = self._model.device
        inputs, targets = (torch.from_numpy(a).to(device) for a in (batch.inputs, batch.targets))
        labels = torch.from_numpy(batch.targeted).to(device).long()
        output = self.body(input_ids=inputs, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)[targets]  # (targets, D)
        leaf = hidden.detach().requires_grad_()  # collects what the chunks send back
        total = torch.zeros((), device=device)
        rows = max(1, LOGITS_AT_ONCE // self._model.config.get_text_config().vocab_size)
        for piece, label in zip(leaf.split(rows), labels.split(rows), strict=True):  # type: ignore[no-untyped-call]
            self._body_output.output = replace(output, last_hidden_state=piece[None])
            logits = self._model(input_ids=inputs[:1, :1], use_cache=False).logits[0]  # (rows, V)
            loss = functional.cross_entropy(logits.float(), label, reduction="sum") / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        hidden.backward(leaf.grad)
        self._body_output.output = None
        return total


class _BodyOutput(torch.nn.Module):
    """Stands where the model's body was, and gives what the body gave before."""

    output: Any = None

    def forward(self, *_: object, **__: object) -> Any:
        return self.output
