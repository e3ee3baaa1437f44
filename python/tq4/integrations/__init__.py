"""TQ4 caches inside other libraries; each module needs its library, this package needs none of them."""
