"""How costs grow with the number of layers and the size of a model, and what many adapters cost on one.

python -m benchmarks.scale                      # plan, inject, save, load, merge over 100 to 10,000 layers
python -m benchmarks.scale --sizes 10 100 1000  # also over models of so many MB
python -m benchmarks.scale --adapters           # also 100 adapters on one ViT-S: memory, switching, a mixed batch
"""
