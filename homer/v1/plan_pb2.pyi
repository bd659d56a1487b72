from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class PlanKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLAN_KIND_UNSPECIFIED: _ClassVar[PlanKind]
    PLAN_KIND_BALANCED: _ClassVar[PlanKind]
    PLAN_KIND_PAPER: _ClassVar[PlanKind]
PLAN_KIND_UNSPECIFIED: PlanKind
PLAN_KIND_BALANCED: PlanKind
PLAN_KIND_PAPER: PlanKind
