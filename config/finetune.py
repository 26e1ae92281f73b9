# Fine-tuning: trains GPT-2 on a text of yours and keeps the weights with the lowest validation loss.
# python train.py config/finetune.py --input=my.txt --dataset=mine_gpt2
# With --init_from=auto:gpt2 the same command resumes the run if there is one.
# A step is 8,192 tokens and takes 12 s on two CPU cores with bf16.
out_dir = 'out/finetune'
init_from = 'gpt2'     # OpenAI's, from the Hub; or the path of a model of folio, nanoGPT or Hugging Face

batch_size = 4
gradient_accumulation_steps = 8
seq_len = 256          # longer windows show more context and take more memory
dropout = 0.1

learning_rate = 5e-5   # a tenth of a new model's, so that it forgets little of what it knows
min_lr = 5e-6
warmup_iters = 10
max_iters = 200

patience = 3           # stop after this many evaluations without a better validation loss
log_interval = 1
eval_interval = 10
eval_iters = 20
checkpoint_interval = 50
sample_interval = 50
final_eval_tokens = 40_000
