"""The reference implementation's work for one step, written anew from a description of what it computes.

Two whole passes of captions padded to 24, each with its own run of the vision tower; logits of every position; [RET]
as a row of the embedding matrix, so that the whole matrix has a gradient, of which all but one row is set to zero, and
optimizer states; one backward pass over the sum of all losses; [RET] scaled to the mean norm of all other rows.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from visual_ground import GroundedModel


class Baseline(nn.Module):
    """A copy of a grounded model's LM with a trained embedding matrix, and its layers.

    Args:
        model: the grounded model, whose adapter's values are taken over.
    """

    def __init__(self, model: GroundedModel) -> None:
        super().__init__()
        lm = copy.deepcopy(model.lm.__dict__["_modules"])
        self.ret = model.ret_token_id
        self.lm = type(model.lm)(model.lm.config).to(model.lm.dtype)
        self.lm._modules.update(lm)
        for module in self.lm.modules():
            module._forward_hooks.clear(), module._forward_pre_hooks.clear()
        self.lm.eval().requires_grad_(False)
        words = model.lm.get_input_embeddings().weight[: self.ret].detach()
        table = nn.Parameter(torch.cat([words, model.adapter.ret_input.detach()[None].to(words)]))
        self.lm.get_input_embeddings().weight = table
        self.lm.get_output_embeddings().weight = table
        self.table, self.vision = table, model.vision
        for name in ("image_projection", "image_retrieval_projection", "text_retrieval_projection"):
            setattr(self, name, copy.deepcopy(getattr(model.adapter, name)))
        self.logit_scale = nn.Parameter(model.adapter.logit_scale.detach().clone())
        trained = [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("vision")]
        self.trained = list(dict.fromkeys(trained))
        self.optimizer = torch.optim.AdamW(self.trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def loss(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Return the loss of padded rows [BOS, words, RET] (b, 24) and their images."""
        pad = 1
        embed = self.lm.get_input_embeddings()
        rows = self.image_projection(self.vision(pixels).float())[:, None].to(self.table.dtype)
        output = self.lm(inputs_embeds=torch.cat([rows, embed(ids)], 1), output_hidden_states=True, use_cache=False)
        labels = F.pad(ids.masked_fill((ids == pad) | (ids == self.ret), -100), (1, 0), value=-100)
        caption_loss = _cross_entropy(output.logits, labels)
        images = F.normalize(self.image_retrieval_projection(self.vision(pixels).float()), dim=-1)
        output = self.lm(inputs_embeds=embed(ids), output_hidden_states=True, use_cache=False)
        text_loss = _cross_entropy(output.logits, ids.masked_fill(ids == pad, -100))
        where = (ids == self.ret).long().argmax(1)
        states = output.hidden_states[-1][torch.arange(len(ids), device=ids.device), where].float()
        texts = F.normalize(self.text_retrieval_projection[0](states), dim=-1)
        scores, own = self.logit_scale.exp() * texts @ images.T, torch.arange(len(ids), device=ids.device)
        return caption_loss + text_loss + (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    def step(self, ids: torch.Tensor, pixels: torch.Tensor) -> float:
        """Run one whole step; return its loss."""
        self.optimizer.zero_grad()
        loss = self.loss(ids, pixels)
        loss.backward()
        self.table.grad[: self.ret] = 0
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            norm = self.table[: self.ret].norm(dim=-1).mean()
            self.table[self.ret] *= norm / self.table[self.ret].norm()
        return float(loss.detach())


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def padded_ids(batch: dict, length: int = 24) -> torch.Tensor:
    """Return the retrieval rows of a batch, padded with pad (1) to `length` as the reference pads."""
    return torch.tensor([[*sequence.ids, *[1] * (length - len(sequence.ids))] for sequence in batch["retrieval"]])
