//! Panics of a machine process: a defect in a device's thread ends the machine with a word, instead of leaving it half
//! alive.

use std::any::Any;
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};
use std::thread::JoinHandle;

use crate::control::{Control, Outcome};

/// Threads that only answer questions about the machine, which goes on without an answer.
pub const BYSTANDERS: [&str; 2] = ["control", "connection"];

static MACHINE: Mutex<Weak<Control>> = Mutex::new(Weak::new());

/// From now on a panic of any thread but the [`BYSTANDERS`] ends this machine as a crash. For a process with one machine.
pub fn ends(control: &Arc<Control>) {
    static HOOK: Once = Once::new();
    *MACHINE.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(control);
    HOOK.call_once(|| {
        let say = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            say(panic);
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("without a name");
            if BYSTANDERS.contains(&name) {
                return;
            }
            let machine = MACHINE
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .upgrade();
            if let Some(control) = machine {
                control.end(crash(name, panic.payload()));
            }
        }));
    });
}

/// How a machine ends by the panic of a thread.
pub fn crash(thread: &str, payload: &(dyn Any + Send)) -> Outcome {
    Outcome::Crash(format!("a defect in thread {thread}: {}", words(payload)))
}

/// What a panic said.
fn words(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

/// Waits for a device's thread. Its panic is no secret where it would be looked for: in a debug build it goes on here.
pub fn join(thread: JoinHandle<()>) {
    if let Err(panic) = thread.join() {
        tracing::error!("a device's thread had a defect: {}", words(&*panic));
        if cfg!(debug_assertions) && !std::thread::panicking() {
            std::panic::resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn panics(name: &str, panic: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(panic)
            .unwrap()
    }

    fn defects_of_jobs_leave_the_others_to_be_done() {
        let pool = crate::pool::Pool::new("test").unwrap();
        let done = Arc::new(AtomicU32::new(0));
        for number in 0..20 {
            let done = done.clone();
            pool.run(move || {
                assert!(number % 2 == 0, "an odd job");
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        pool.wait_idle();
        assert_eq!(done.load(Ordering::SeqCst), 10);
        let closing = std::panic::AssertUnwindSafe(|| pool.close());
        let said = std::panic::catch_unwind(closing).unwrap_err();
        assert_eq!(words(&*said), "an odd job");
        pool.close();
    }

    // In one test: what one of them does on purpose must not end the machine of another.
    #[test]
    fn a_panic_is_told_and_ends_the_machine_but_not_for_a_question_about_it() {
        let (told, untold) = (Box::new(7), panics("worker", || panic!("{} words", 2)));
        assert_eq!(words(&*untold.join().unwrap_err()), "2 words");
        assert_eq!(words(&*(told as Box<dyn Any + Send>)), "no message");

        let joined = std::panic::catch_unwind(|| join(panics("worker", || panic!("a word"))));
        assert_eq!(words(&*joined.unwrap_err()), "a word");

        defects_of_jobs_leave_the_others_to_be_done();

        let control = Control::new();
        ends(&control);
        let _ = panics(BYSTANDERS[1], || panic!("no answer")).join();
        assert_eq!(control.outcome(), None);
        let _ = panics("disk0", || panic!("an odd request")).join();
        let why = "a defect in thread disk0: an odd request".to_owned();
        assert_eq!(control.outcome(), Some(Outcome::Crash(why)));
    }
}
