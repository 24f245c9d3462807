"""The request and answer formats that nearhit can cache, one module each. All pure."""

from proxy.cache.dialects.call import Call, NotCacheable
from proxy.cache.dialects.chat import CHAT
from proxy.cache.dialects.completions import COMPLETIONS
from proxy.cache.dialects.dialect import Dialect

DIALECTS: tuple[Dialect, ...] = (CHAT, COMPLETIONS)

__all__ = ["CHAT", "COMPLETIONS", "DIALECTS", "Call", "Dialect", "NotCacheable"]
