"""How fast a chip could make a workload, from operations and bytes alone.

A transformer has products (at the chip's matrix rate, or waiting for weights), attention, and work per
element (at its bandwidth); they follow each other within a layer, so that their times add up. The autoencoder
and the ViT are counted by their operations alone. What requests have in common is done once, all rows of a
step are one forward, and nothing is waited for: a runtime can come near these times, and passes them only by
what it saves of the work per element (a tenth at most, by putting it into the products' kernels). The rates
are what large products and copies reach, not data sheets' peaks: measure your own and give them.
"""
