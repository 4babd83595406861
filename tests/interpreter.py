"""Triton's interpreter without the third of its time that it spends on patching `triton.language`.

Every call of a device function patches the language again, which walks through all of its members,
though the launch of the kernel around it has done so already. Here a launch patches each module
once. What is interpreted stays the same.
"""

from typing import Any

from triton import language
from triton.runtime import interpreter


class _Patcher:
    """`interpreter._patch_lang`, which remembers what the launch in progress has patched."""

    def __init__(self) -> None:
        self.patch = interpreter._patch_lang
        self.patched: set[str] = set()

    def __call__(self, function: Any) -> Any:
        """Patch the modules that `function` names; return the scope that puts them back."""
        modules = (language, language.core)
        found = {
            module.__name__
            for module in modules
            if any(value is module for value in function.__globals__.values())
        }
        if found <= self.patched:
            return interpreter._LangPatchScope()
        scope = self.patch(function)
        is_launch, self.patched = not self.patched, self.patched | found
        if is_launch:  # scopes of device functions are never restored
            self._forget_after(scope)
        return scope

    def _forget_after(self, scope: Any) -> None:
        restore = scope.restore

        def forget() -> None:
            self.patched = set()
            restore()

        scope.restore = forget


def patch_once() -> None:
    """Install the patcher, unless it is there."""
    if not isinstance(interpreter._patch_lang, _Patcher):
        interpreter._patch_lang = _Patcher()
