"""`nearhit demo`: a real llama.cpp with a small model, nearhit in front of it, and what repeated questions cost.

`run.run` does it all; `screen.Screen` prints; `workload` and `totals` are pure. Both servers are processes of their
own that end when the demo does, however it ends.
"""
