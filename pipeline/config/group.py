"""What every group of a config has in common."""

from __future__ import annotations

from typing import Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, TypeAdapter, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Group(BaseModel):
    """Base of all groups: unknown fields are errors, values do not change after loading."""

    tag: ClassVar[str] = "kind"  # the field that chooses, where a group is one of several
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _switches_only_where_asked(cls, values: Any) -> Any:
        """YAML reads yes, no, on and off as true and false, which pydantic would take for 1 and 0."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if field is None or bool in (field.annotation, *get_args(field.annotation)):
                continue
            items = value if isinstance(value, list | tuple) else [value]
            at: list[tuple[Any, ...]] = [(name,)] if any(isinstance(item, bool) for item in items) else []
            if get_origin(field.annotation) is dict and isinstance(value, dict):
                at += [(name, key) for key, item in value.items() if isinstance(item, bool)]
            if at:
                raise PydanticCustomError("misplaced_switch", "true or false", {"at": at[0]})
        return values


class CheckedBy:
    """Holds fields in a plain dict to a schema: in `Annotated`, behind the type of the dict.

    The values stay as they are given: nothing is converted, and no default is filled in.
    """

    def __init__(self, annotation: Any) -> None:
        """`annotation` is a group, or a union of groups that one field tells apart."""
        self.annotation = annotation
        self.validate = TypeAdapter(annotation).validate_python

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def _check(self, values: Any) -> Any:
        self.validate(values)
        return values
