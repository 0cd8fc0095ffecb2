"""What every group of a config has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Group(BaseModel):
    """Base of all groups: unknown fields are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _switches_only_where_asked(cls, values: Any) -> Any:
        """YAML reads yes, no, on and off as true and false, which pydantic would take for 1 and 0."""
        for name, value in values.items() if isinstance(values, dict) else ():
            items = value if isinstance(value, list | tuple) else [value]
            field = cls.model_fields.get(name)
            if field and field.annotation is not bool and any(isinstance(item, bool) for item in items):
                raise PydanticCustomError("misplaced_switch", "true or false", {"field": name})
        return values
