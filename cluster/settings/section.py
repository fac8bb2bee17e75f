"""What every table of settings has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen table of settings that takes no unknown key and converts no types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)
