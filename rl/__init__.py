"""Reinforcement learning from verifiable rewards, as in DeepSeek-R1 (arXiv:2501.12948).

    config, templates, tasks/     configuration of an RL run, prompt templates, and problems with
                                  checks of their answers
    rollout, sampler              sampling of completions, on one device or several
    extraction, rewards           a completion's reasoning and answer, and rule-based rewards
    sandbox, sandbox_child,       execution of untrusted programs against their tests
    isolation
    advantages, objective, value  group-relative advantages and GAE; the losses of GRPO (R1's and
                                  DeepSeekMath's), Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE and
                                  PPO; PPO's value model
    step, loop                    the jitted update, and the training loop
    evaluate, pass_rates          pass@k, cons@k and other figures, with bootstrap intervals
    reflection                    whether reflections ("wait") raise the accuracy
    documents, loading, stages    documents for pretraining, loading of trained models, and the
                                  stages of R1's pipeline
"""
