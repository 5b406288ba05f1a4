"""Give any language model eyes, and let it answer with pictures, without touching its weights."""

from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingError

__all__ = ["GroundingConfig", "GroundingError"]
