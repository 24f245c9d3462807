"""The commands of `nearhit`, by what they work on; `proxy.cli` puts them together."""
