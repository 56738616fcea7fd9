//! Shows what Weir costs and what it does, from outside: a sample function to
//! call, load, the replay of a trace, cold starts, memory, restarts, callers
//! that leave, states. It speaks HTTP to a running `weir serve` and shares no
//! code with it.

mod client;
pub mod https;
pub mod leave;
pub mod load;
pub mod memory;
mod output;
pub mod replay;
pub mod restart;
pub mod sample;
pub mod state;
mod tally;
mod times;
pub mod wake;

#[derive(Debug, clap::Subcommand)]
pub enum Bench {
    /// Call a function at a rate, or by so many callers, and show throughput
    /// and latencies
    Load(load::LoadArgs),
    /// Send the requests of an LLM trace (Azure's or Mooncake's format) at the
    /// trace's times, and compare the instance-seconds used with the least
    /// possible
    Replay(replay::ReplayArgs),
    /// Measure what Weir adds to an instance's own start
    Wake(wake::WakeArgs),
    /// Measure the memory that queued invocations and idle connections take
    Memory(memory::MemoryArgs),
    /// Kill a `weir serve` of its own again and again, and measure how soon it
    /// is ready and serves
    Restart(restart::RestartArgs),
    /// Measure how soon a place in the queue is free after its caller left
    Leave(leave::LeaveArgs),
    /// Measure how soon a version is DEGRADING after an instance was killed
    State(state::StateArgs),
}

pub async fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Load(args) => load::load(args).await,
        Bench::Replay(args) => replay::replay(args).await,
        Bench::Wake(args) => wake::wake(args).await,
        Bench::Memory(args) => memory::memory(args).await,
        Bench::Restart(args) => restart::restart(args).await,
        Bench::Leave(args) => leave::leave(args).await,
        Bench::State(args) => state::state(args).await,
    }
}
