//! Who runs next.

use super::{count, is_broken};
use millpond::model;
use shuttle::current::TaskId;
use shuttle::scheduler::{Schedule, Scheduler, Task};

/// The clock is the first task that the main one starts.
const CLOCK: usize = 1;

/// Chooses at random. The clock runs when every other task waits; now and then, if there is `haste`, before that.
pub struct Order {
    seed: u64,
    dice: fastrand::Rng,
    /// How probable it is that the running task goes on.
    stay: f64,
    haste: f64,
    done: bool,
}

impl Order {
    pub fn new(seed: u64, stay: f64, haste: f64) -> Order {
        Order { seed, dice: fastrand::Rng::with_seed(seed ^ 0x0bde), stay, haste, done: false }
    }
}

impl Scheduler for Order {
    fn new_execution(&mut self) -> Option<Schedule> {
        (!std::mem::replace(&mut self.done, true)).then(|| Schedule::new(self.seed))
    }

    fn next_task(&mut self, tasks: &[&Task], current: Option<TaskId>, is_yielding: bool) -> Option<TaskId> {
        if is_broken() {
            return None;
        }
        let id = |task: &&&Task| usize::from(task.id());
        let ready = || tasks.iter().filter(|task| task.runnable());
        let others = ready().filter(|task| id(task) != CLOCK).count();
        let clock = ready().find(|task| id(task) == CLOCK);
        let next = match clock {
            Some(clock) if others == 0 => {
                model::world(|world| world.note_alone());
                clock
            }
            Some(clock) if self.haste > 0.0 && self.dice.f64() < self.haste => clock,
            _ => {
                let stays = current.filter(|_| !is_yielding && self.dice.f64() < self.stay);
                let same = stays.and_then(|now| ready().find(|task| task.id() == now && id(task) != CLOCK));
                same.or_else(|| ready().filter(|task| id(task) != CLOCK).nth(self.dice.usize(0..others.max(1))))?
            }
        };
        count(usize::from(next.id()));
        Some(next.id())
    }

    fn next_u64(&mut self) -> u64 {
        self.dice.u64(..)
    }
}
