"""The near tier: which stored prompt asks the same in slightly other words. Sketches find, the guard decides."""
