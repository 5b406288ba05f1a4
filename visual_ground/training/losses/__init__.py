"""The losses: captioning, text retrieval and contrastive.

`objective.GroundingObjective` is what is trained; `objective.Loss` is the protocol of losses of one's own.
"""
