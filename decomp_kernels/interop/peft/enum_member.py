"""One more member for an Enum of strings whose classes are closed: PEFT's PeftType.

Python offers no way to extend an Enum that has members, so this writes to the tables that an
EnumType keeps (CPython 3.11 to 3.13 have the same), and then asks the enum everything that anybody
could ask it.  Only the standard library is imported, so that it can be tried under any Python.
"""

import enum
from typing import Any


def add_member(cls: Any, name: str) -> Any:
    """The member ``name`` = "name" of ``cls``, made where it is missing.

    cls: an Enum of strings, as in ``class PeftType(str, Enum)``.  Raises TypeError for anything
    else, and RuntimeError, with ``cls`` as it was, where this Python's enums work otherwise.
    """
    if not (isinstance(cls, type) and issubclass(cls, enum.Enum) and issubclass(cls, str)):
        raise TypeError(f"cls must be an Enum of strings, got {cls!r}")
    if name in cls.__members__:
        return cls[name]
    try:
        member = _make(cls, name)
        wrong = _what_is_wrong(cls, name, member)
    except Exception as error:  # whatever another Python's enum says to this
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        _drop(cls, name)
        raise RuntimeError(f"the enum {cls.__name__} cannot take a member {name!r} here: {wrong}")
    return member


def _make(cls: Any, name: str) -> Any:
    member: Any = str.__new__(cls, name)
    member._name_ = member._value_ = name
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[name] = member
    type.__setattr__(cls, name, member)  # EnumType's own lets nobody set an attribute of a member
    return member


def _what_is_wrong(cls: Any, name: str, member: Any) -> str:
    """The first thing that a new member does not do as the others do, or ""."""
    checks = {
        "lookup by value": cls(name) is member,
        "lookup by name": cls[name] is member,
        "attribute": getattr(cls, name) is member,
        "iteration": list(cls)[-1] is member and len(cls) == len(list(cls)),
        "membership": member in cls and name in list(cls),
        "comparison with its string": member == name and hash(member) == hash(name),
        "name and value": (member.name, member.value) == (name, name),
        "pickling": member.__reduce_ex__(2) == (cls, (name,)),
        "type": type(member) is cls,
    }
    return ", ".join(f"{what} fails" for what, right in checks.items() if not right)


def _drop(cls: Any, name: str) -> None:
    if name in cls._member_names_:
        cls._member_names_.remove(name)
    cls._member_map_.pop(name, None)
    cls._value2member_map_.pop(name, None)
    if name in vars(cls):
        type.__delattr__(cls, name)
