"""A training-free pruner: of every image the visual tokens stay that are least like their tile."""

import torch

from .configuration_pruning import PruningConfig
from .head_vtc import VtcForConditionalGeneration
from .layout_vtc import Layout
from .modeling_vtc import VtcModel
from .packing_vtc import to_device
from .vision_vtc import Choice, Scores, VisualTokens, VtcVisionHalf


class PruningSteps:
    """`router_decisions` are `(V,)`, True at the visual tokens that stay."""

    config_class = PruningConfig

    def score(self, features: torch.Tensor, prompts: torch.Tensor | None, layout: Layout) -> Scores | None:
        if layout.wants_all:
            return None
        tokens = self.multi_modal_projector(features)
        scores = (tokens - tokens.mean(1, keepdim=True)).norm(dim=-1).flatten()
        return Scores((scores.detach(),), scores, tokens.flatten(0, 1))

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        stays = torch.full((int(layout.num_reserved.sum()),), not scores)
        for each in scores:
            images = zip(each.split(layout.num_reserved.tolist()), stays.split(layout.num_reserved.tolist()))
            for (own, staying), count in zip(images, layout.num_leaving.tolist(), strict=True):
                staying[own.topk(count).indices] = True
        return Choice(layout.num_leaving, layout.num_leaving, stays)

    def connect(self, features: torch.Tensor, choice: Choice, layout: Layout, scores: Scores | None) -> VisualTokens:
        if scores is None:
            return super().connect(features, choice, layout, scores)
        slots = choice.decisions.nonzero().flatten()
        (on_device,) = to_device(scores.reused.device, slots)
        return VisualTokens(scores.reused[on_device], slots)


class PruningVision(PruningSteps, VtcVisionHalf):
    """Tower and connector."""


class PruningModel(PruningSteps, VtcModel):
    """The pruner without a head."""


class PruningForConditionalGeneration(VtcForConditionalGeneration):
    """The pruner with a language modelling head."""

    config_class = PruningConfig
    model_class = PruningModel
