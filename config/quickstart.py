# Characters and a small GPT: all of folio in a minute or two on two CPU cores.
# python train.py config/quickstart.py
out_dir = 'out/quickstart'
dataset = 'shakespeare_char'
tokenizer = 'char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
max_iters = 2000

log_interval = 100
eval_interval = 250
sample_interval = 500
