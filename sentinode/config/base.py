"""What every configuration shares."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

Rgb = tuple[float, float, float]
Fraction = Annotated[float, Field(ge=0, le=1)]
# What every generator that is seeded with it accepts.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Engine = Literal["auto", "torch", "onnxruntime", "openvino", "onnxruntime-int8"]


class Config(BaseModel):
    """Base of every configuration: immutable, and no key is ever ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, fields: Any) -> Any:
        # Pydantic takes `epochs: true` for 1, and YAML makes true of `yes` and `on`.
        for name, value in fields.items() if isinstance(fields, dict) else ():
            kinds = _kinds_of(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            values = value if isinstance(value, list | tuple) else [value]
            if kinds & {int, float} and not kinds & {bool, Any} and any(isinstance(item, bool) for item in values):
                complaint = PydanticCustomError("number_type", "Input should be a number, not true or false")
                raise ValidationError.from_exception_data(cls.__name__, [{"type": complaint, "loc": (name,), "input": value}])
        return fields


def _kinds_of(annotation: Any) -> set[Any]:
    """Every type that an annotation is made of."""
    return {annotation}.union(*map(_kinds_of, get_args(annotation)))
