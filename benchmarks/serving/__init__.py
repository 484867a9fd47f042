"""What a server of many adapters on one base answers, beside one merged model for each.

python -m benchmarks.serving
"""
