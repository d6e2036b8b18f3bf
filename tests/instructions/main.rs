//! Checks a connection without I/O out and returns it, `N` times, on a pool of one: `millpond-instructions SETTING N`. With
//! `health` it asks for the pool's health instead.
//!
//! `.ci/instructions` runs this under valgrind with two values of `N`. What the set-up costs is the same in both.

use millpond::event::NopEventHandler;
use millpond::{Builder, Pool};
use std::convert::Infallible;
use std::env::args;
use std::hint::black_box;
use std::time::Duration;

/// Opens and checks connections that are nothing, in no time.
#[derive(Debug)]
struct Nils;

impl r2d2::ManageConnection for Nils {
    type Connection = u64;
    type Error = Infallible;

    fn connect(&self) -> Result<u64, Infallible> {
        Ok(0)
    }

    fn is_valid(&self, _: &mut u64) -> Result<(), Infallible> {
        Ok(())
    }

    fn has_broken(&self, _: &mut u64) -> bool {
        false
    }
}

/// What is set beside the defaults.
fn with(setting: &str, builder: Builder<Nils>) -> Builder<Nils> {
    match setting {
        "off" | "health" => builder,
        "leak-detection" => builder.leak_threshold(Duration::from_secs(30)),
        "events" => builder.event_handler(Box::new(NopEventHandler)),
        "floor" => builder.min_idle(1),
        _ => panic!("no such setting: {setting}"),
    }
}

fn main() {
    const USAGE: &str = "millpond-instructions off|leak-detection|events|floor|health N";
    let setting = args().nth(1).expect(USAGE);
    let n: u32 = args().nth(2).and_then(|n| n.parse().ok()).expect(USAGE);
    let pool = with(&setting, Pool::builder().max_size(1)).build(Nils).expect("a pool");
    drop(pool.get());
    if setting == "health" {
        (0..n).for_each(|_| _ = black_box(pool.health()));
        return;
    }
    for _ in 0..n {
        black_box(&mut *pool.get().expect("the connection"));
    }
}
