"""What tests of AVG-LLaVA share."""

import torch

# of the tiny model, finest last
SCALES = [1, 2, 4, 8, 16]


def router_logits(model, batch):
    with torch.no_grad():
        return model(**batch).router_logits
