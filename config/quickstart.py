# Characters and a small GPT: all of folio within a minute on two CPU cores. Validation loss 4.19 -> 1.75.
# python train.py config/quickstart.py
out_dir = 'out/quickstart'
dataset = 'shakespeare_char'
tokenizer = 'char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12

learning_rate = 6e-3
min_lr = 3e-4
warmup_iters = 100
beta2 = 0.99
max_iters = 2000

log_interval = 100
eval_interval = 500
sample_interval = 1000
