//! What a `postgres::Client` knows without asking its server: the messages that have arrived, and above all whether the
//! connection has ended.

use super::watch::Watch;
use ::postgres::Client;
use ::postgres::fallible_iterator::FallibleIterator;
use std::time::Duration;

/// How long a look may take in the worst case: when half a message has arrived, and the other half does not come.
const LONGEST_LOOK: Duration = Duration::from_millis(1);
/// How many notifications a look reads at most, so that it ends even if more come all the time.
const MANY: usize = 1000;

/// Sends the messages that `client` has queued but not yet written, without waiting for anything. A dropped statement
/// or COPY leaves such a message, and the [`Watch`] cannot know of it before it is written. `flush` also reads, once,
/// what has arrived: do not call it where that may be much. It drops the notifications, which were for the last caller.
///
/// # Errors
///
/// If the connection is found dead. Success does not say that it is alive.
pub(in crate::postgres) fn flush(client: &mut Client) -> Result<(), ::postgres::Error> {
    drop_notifications(client);
    client.notifications().iter().next()?;
    drop_notifications(client);
    Ok(())
}

/// Drops the notifications that `client` has read. Looks for no others.
pub(in crate::postgres) fn drop_notifications(client: &mut Client) {
    while !client.notifications().is_empty() {
        // As long as a notification is there, this does not look at the stream.
        let _ = client.notifications().iter().next();
    }
}

/// Looks whether `client` is alive, as far as can be seen from here. Sends the messages it has queued, and drops the
/// notifications that have arrived. `Ok(false)`: it cannot be seen, or the stream has ended.
///
/// A `postgres::Client` reads what its runtime has learned from the system. The runtime asks the system only when it
/// has nothing else to do, which is when a caller waits. So this waits for a notification. When the stream first has
/// nothing to read, it wakes the runtime at once, which then asks the system. When it has nothing to read after that,
/// it makes up a notification. All of that takes a few microseconds.
///
/// # Errors
///
/// If the connection is found dead.
pub(in crate::postgres) fn look(client: &mut Client, watch: &Watch) -> Result<bool, ::postgres::Error> {
    flush(client)?;
    if !watch.is_idle() {
        return Ok(false);
    }
    watch.probe.begin();
    let result = wait_for_the_made_up(client);
    watch.probe.end();
    Ok(result? && watch.is_idle())
}

fn wait_for_the_made_up(client: &mut Client) -> Result<bool, ::postgres::Error> {
    let mut notifications = client.notifications();
    let mut coming = notifications.timeout_iter(LONGEST_LOOK);
    for _ in 0..MANY {
        match coming.next()? {
            Some(notification) if notification.channel().is_empty() => return Ok(true),
            Some(_) => {}
            None => return Ok(false),
        }
    }
    Ok(false)
}
