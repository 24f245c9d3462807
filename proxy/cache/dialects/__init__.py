"""The request and answer formats that nearhit can cache, one module each. All pure."""

from proxy.cache.dialects.call import Call, NotCacheable
from proxy.cache.dialects.chat import CHAT
from proxy.cache.dialects.completions import COMPLETIONS
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.dialects.embeddings import EMBEDDINGS
from proxy.cache.dialects.messages import MESSAGES
from proxy.cache.dialects.responses import RESPONSES

DIALECTS: tuple[Dialect, ...] = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS)

__all__ = ["CHAT", "COMPLETIONS", "DIALECTS", "EMBEDDINGS", "MESSAGES", "RESPONSES", "Call", "Dialect", "NotCacheable"]
