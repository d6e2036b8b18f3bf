//! What goes wrong, and what operators do.

use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use postgres::NoTls;

use crate::journal::Dice;
use crate::lane::Lane;
use crate::support::{Proxy, ms};
use crate::world::World;

/// Draws one fault or order, does it, and undoes it where it lasts.
pub(crate) fn strike(world: &World, lanes: &[Lane], dice: &mut Dice) {
    let journal = &world.journal;
    let lane = &lanes[dice.roll(lanes.len() as u64) as usize];
    match dice.roll(43) {
        0..5 => {
            let n = world.terminate(&lane.name, true);
            journal.event(format_args!("terminate-one of {}: {n}", lane.name));
        }
        5..7 => {
            let n = world.terminate(&lane.name, false);
            journal.event(format_args!("terminate-all of {}: {n}", lane.name));
        }
        7..11 => lane.resize(world, dice),
        11..13 => lane.recycle(world),
        13..17 => {
            let time = dice.pick(&[ms(60), ms(300), ms(1800)]);
            lasts(world, dice, "pause", time, |proxy| proxy.pause(), |proxy| proxy.resume());
        }
        17..20 => {
            journal.event("reset of every connection");
            world.proxy.cut();
        }
        20..23 => {
            let time = dice.between(100, 1500);
            // What was accepted in silence is never answered, not even later.
            let end = |proxy: &Proxy| {
                proxy.silent(false);
                proxy.cut();
            };
            lasts(world, dice, "silence", time, |proxy| proxy.silent(true), end);
        }
        23..26 => {
            let time = dice.between(50, 700);
            lasts(world, dice, "refuse", time, |proxy| proxy.refuse(), |proxy| proxy.accept());
        }
        26..29 => {
            let (time, latency) = (dice.between(100, 700), dice.pick(&[ms(5), ms(40), ms(200)]));
            lasts(world, dice, "latency", time, |proxy| proxy.latency(latency), |proxy| proxy.latency(ms(0)));
        }
        29..31 => {
            let (time, delay) = (dice.between(100, 700), dice.pick(&[ms(20), ms(200), ms(900)]));
            lasts(world, dice, "delay", time, |proxy| proxy.delay(delay), |proxy| proxy.delay(ms(0)));
        }
        31..34 => full(world, dice),
        34..37 => {
            journal.event("password changed");
            world.password(false);
            thread::sleep(dice.between(50, 900));
            world.password(true);
            // As its documentation says: when a password was changed.
            lanes.iter().for_each(|lane| lane.recycle(world));
        }
        37..39 => {
            journal.event("calm");
            thread::sleep(dice.between(200, 800));
        }
        39..42 => {
            // Long enough for what is too old, or idle for too long, to be seen.
            journal.event(format_args!("hush of the users of {}", lane.name));
            lane.hushed.store(true, SeqCst);
            thread::sleep(dice.between(500, 2500));
            lane.hushed.store(false, SeqCst);
        }
        _ => restart(world, dice),
    }
}

/// A fault of the network that lasts. Now and then a backend is ended meanwhile.
fn lasts(
    world: &World,
    dice: &mut Dice,
    what: &str,
    time: Duration,
    begin: impl FnOnce(&Proxy),
    end: impl FnOnce(&Proxy),
) {
    world.journal.event(format_args!("{what} for {time:?}"));
    world.foul();
    begin(&world.proxy);
    thread::sleep(time / 2);
    if dice.one_in(4) {
        world.journal.event("reset of every connection, meanwhile");
        world.proxy.cut();
    }
    thread::sleep(time / 2);
    end(&world.proxy);
    world.fair();
    world.journal.event(format_args!("fair after {what}"));
}

/// Others use up `max_connections`.
fn full(world: &World, dice: &mut Dice) {
    let mut others = Vec::new();
    while let Ok(client) = world.user_beside_the_proxy().connect(NoTls) {
        others.push(client);
    }
    world.journal.event(format_args!("full with {} of others", others.len()));
    thread::sleep(dice.between(50, 700));
    drop(others);
    world.journal.event("room after full");
}

fn restart(world: &World, dice: &mut Dice) {
    let (server, how) = (&world.server, dice.roll(3));
    world.journal.event(format_args!("restart {}", ["fast", "immediate", "by SIGKILL"][how as usize]));
    world.foul();
    match how {
        0 => server.stop_fast(),
        1 => server.stop_immediate(),
        _ => server.kill(),
    }
    thread::sleep(dice.pick(&[ms(0), ms(200), ms(800)]));
    server.start_again();
    world.fair();
    world.journal.event("up after restart");
}
