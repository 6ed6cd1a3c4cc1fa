"""How fast a chip could make a workload, from operations and bytes alone.

Each phase has products (at the chip's matrix rate, or waiting for weights), attention, and work per element
(at its bandwidth); they follow each other within a layer, so that their times add up. What requests have in
common is done once, all rows of a step are one forward, and nothing is waited for: a runtime can come near
these times and not pass them. The rates are what large products and copies reach, not data sheets' peaks:
measure your own and give them.
"""
