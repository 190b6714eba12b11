"""Section of a recipe that describes a network."""

from typing import Annotated

from pydantic import Field, model_validator

from cdistill.errors import RecipeError
from cdistill.settings import Count, Rate, Section


class NetworkSection(Section):
    """A small DDPM++ (arguments of SongUNet)."""

    model_channels: Annotated[int, Field(ge=16, le=4096, multiple_of=4)]
    channel_mult: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=12)]
    num_blocks: Annotated[int, Field(ge=1, le=64)]
    attn_resolutions: Annotated[list[Count], Field(max_length=12)]
    dropout: Rate = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> "NetworkSection":
        for width in (self.model_channels, *[self.model_channels * factor for factor in self.channel_mult]):
            if width % min(32, width // 4):
                raise ValueError(f"model_channels: {width} channels make no {min(32, width // 4)} equal groups")
        return self

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises RecipeError unless the network takes images of `shape` (C, H, W), those of the data called `name`.

        They are square, as those of all of EDM's networks; they can be halved as often as the network does, and
        attention has its place.
        """
        if len(shape) != 3:
            raise RecipeError(f"data: {name!r} has no images; a U-Net cannot be trained on it")
        if shape[1] != shape[2]:
            raise RecipeError(
                f"data: {name!r} has images of {shape[2]}x{shape[1]} pixels; the networks take square ones: crop or "
                "pad them all"
            )
        side = shape[2]
        levels = len(self.channel_mult)
        sides = [side >> level for level in range(levels)]
        if side % 2 ** (levels - 1):
            raise RecipeError(
                f"network.channel_mult: {levels} levels; images of {side} pixels cannot be halved so often"
            )
        if wrong := [place for place in self.attn_resolutions if place not in sides]:
            raise RecipeError(f"network.attn_resolutions: got {wrong}; the network has {sides}")
