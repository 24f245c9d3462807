"""Where answers stay. Imports nothing from `proxy`; see `storage.base` for the contract."""
